"""What one rank holds in memory and sends over the wire. Arithmetic on configs; imports no torch.

Symbols of the formulas: T tokens of a micro-step on one rank, N = T * ep, D d_model, V vocabulary, A query heads *
head_dim, G KV heads * head_dim, Q query heads, H the hidden width of all FFN experts together, m = 2 for SwiGLU and 1
for GeLU, h router hidden width, Ea and Ef experts of attention and FFN, c bytes of the compute type (float32: 4,
bfloat16: 2). Norms are counted as the CPU keeps them; a GPU's at bfloat16 keeps 4 D bytes more per token and layer.
"""

from dataclasses import dataclass
from typing import Literal

from dsmoe_ray.model.accounting import (
    ActivationCheckpointing,
    count_parameters,
    ffn_router_parameters,
    total_d_ff,
)
from dsmoe_ray.model.config import DenseFfnConfig, GqaConfig, MoaConfig, ModelConfig, MoeConfig
from dsmoe_ray.parallel.config import ParallelConfig

COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}
MASTER_BYTES = 4
# FSDP2 gathers the next layer while this one computes.
GATHERED_LAYERS = 2
# The loss forms its logits in chunks of this many elements or rows, whichever is more, and holds about three of them
# at a time. A CPU takes a quarter of it.
LOSS_CHUNK_ELEMENTS, LOSS_CHUNK_ROWS = 2**22, 1024


@dataclass(frozen=True)
class StepShape:
    """The part of a training recipe that memory and traffic depend on."""

    num_tokens_per_micro_step: int
    """Tokens one rank holds at a time."""
    num_micro_steps: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: ActivationCheckpointing = "none"


@dataclass(frozen=True)
class RankMemory:
    """Bytes at the peak of a step on one rank, by what they hold."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    working_copies_bytes: int
    activations_bytes: int
    gathered_tokens_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of them; the libraries' own memory comes on top."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.working_copies_bytes
            + self.activations_bytes
            + self.gathered_tokens_bytes
        )


@dataclass(frozen=True)
class RankTraffic:
    """Bytes that one rank sends in an optimizer step; it receives as many."""

    exchange_per_layer_bytes: int
    """Dense all-to-all of one layer, all micro-steps, forward and backward."""
    exchange_bytes: int
    """The same over all layers."""
    reduction_bytes: int
    """Gradient reduction: once a step, or once a micro-step where FSDP2 does it."""
    gather_bytes: int
    """Weights gathered by FSDP2 where parameters are sharded, every micro-step."""


@dataclass(frozen=True)
class _Part:
    """Parameters that are treated alike."""

    num_parameters: int
    """On one rank, if FSDP2 did not shard them."""
    num_shards: int
    num_copies: int
    """Ranks that hold the same shard."""
    gather_bytes: int
    """Bytes of one parameter while it is gathered."""
    is_root: bool = False
    """Gathered once and kept until the backward pass is done: embedding, head and last norm."""


def count_held_parameters(model: ModelConfig, parallel: ParallelConfig) -> tuple[int, int]:
    """Return the trunk and the FFN expert parameters held by one rank.

    ``trunk = (total - experts) / (dp_shard * ep if sharded else 1)``; ``experts = all experts / (ep * dp_shard)``.
    """
    counts = count_parameters(model)
    experts = counts.ffn if isinstance(model.ffn, MoeConfig) else 0
    num_trunk_shards = parallel.dp_shard * parallel.ep if parallel.trunk == "shard" else 1
    return -(-(counts.total - experts) // num_trunk_shards), experts // (parallel.ep * parallel.dp_shard)


def compute_rank_memory(model: ModelConfig, parallel: ParallelConfig, step: StepShape) -> RankMemory:
    """Estimate the peak memory of one rank.

    With P the parameters held (see ``count_held_parameters``): weights ``4 P``, gradients ``4 P``, AdamW moments
    ``8 P``, all float32. The other parts have their formulas in the functions below.
    """
    held = sum(count_held_parameters(model, parallel))
    return RankMemory(
        weights_bytes=MASTER_BYTES * held,
        gradients_bytes=MASTER_BYTES * held,
        optimizer_bytes=2 * MASTER_BYTES * held,
        working_copies_bytes=_working_copies_bytes(model, parallel, step),
        activations_bytes=_activations_bytes(model, parallel, step),
        gathered_tokens_bytes=_gathered_tokens_bytes(model, parallel, step),
    )


def compute_rank_traffic(model: ModelConfig, parallel: ParallelConfig, step: StepShape) -> RankTraffic:
    """Count the bytes one rank sends in a step.

    Per layer and micro-step, with n = ep: tokens and gates are gathered, ``(n-1) T (c D + 4 Ef)`` by NCCL's all-gather
    and ``(n-1) T (c D + 4 Ef / n)`` by gloo's messages; outputs return, ``(n-1) T c D``; backward, ``(n-1) T c D`` and
    ``(n-1) T (c D + 4 Ef / n)``. Full checkpointing repeats the forward half.

    Gradients and weights, as rings move them: an all-reduce of B bytes over r ranks sends ``2 B (r-1)/r``, a
    reduce-scatter or an all-gather ``B (r-1)/r``. What FSDP2 shards is gathered forward and backward (its root once)
    and reduce-scattered, then all-reduced over dp_replicate, every micro-step; all else is all-reduced once a step.
    """
    per_layer = _exchange_per_layer_bytes(model, parallel, step)
    reduction = gather = 0.0
    for part in _split_parameters(model, parallel, step):
        is_sharded = part.num_shards > 1
        scattered = MASTER_BYTES * part.num_parameters * _ring_share(part.num_shards)
        reduced = 2 * MASTER_BYTES * part.num_parameters / part.num_shards * _ring_share(part.num_copies)
        reduction += (scattered + reduced) * (step.num_micro_steps if is_sharded else 1)
        gathered = part.gather_bytes * part.num_parameters * _ring_share(part.num_shards)
        gather += gathered * (1 if part.is_root else 2) * step.num_micro_steps
    return RankTraffic(
        exchange_per_layer_bytes=per_layer,
        exchange_bytes=per_layer * model.num_layers,
        reduction_bytes=round(reduction),
        gather_bytes=round(gather),
    )


def _split_parameters(model: ModelConfig, parallel: ParallelConfig, step: StepShape) -> tuple[_Part, _Part, _Part]:
    """Return the trunk's layers, its root, and the experts."""
    counts = count_parameters(model)
    experts = counts.ffn if isinstance(model.ffn, MoeConfig) else 0
    root = counts.embedding + counts.head + model.d_model
    num_shards = parallel.dp_shard * parallel.ep if parallel.trunk == "shard" else 1
    num_copies = parallel.world_size // num_shards
    return (
        # The trunk is gathered as it is stored, and cast where it is used.
        _Part(counts.total - experts - root, num_shards, num_copies, MASTER_BYTES),
        _Part(root, num_shards, num_copies, MASTER_BYTES, is_root=True),
        _Part(experts // parallel.ep, parallel.dp_shard, parallel.dp_replicate, COMPUTE_BYTES[step.dtype]),
    )


def _working_copies_bytes(model: ModelConfig, parallel: ParallelConfig, step: StepShape) -> int:
    """Return the bytes of weights in a second place: casts to bfloat16, and what FSDP2 gathers."""
    total = _cast_bytes(model, parallel, step)
    for part in _split_parameters(model, parallel, step):
        if part.num_shards == 1:
            continue
        # Its whole gradient is there too, before it is scattered.
        gathered_bytes = (part.gather_bytes + MASTER_BYTES) * part.num_parameters
        total += gathered_bytes * (1.0 if part.is_root else GATHERED_LAYERS / model.num_layers)
    return round(total)


def _cast_bytes(model: ModelConfig, parallel: ParallelConfig, step: StepShape) -> float:
    """Return ``2 B`` per parameter whose cast to bfloat16 lives until its backward pass, 0 for float32.

    These are the matrices of all layers (of parts that are recomputed, one layer's), one layer's gradients and the
    head. Experts gathered by FSDP2 are cast on the way and need no other copy.
    """
    if step.dtype == "float32":
        return 0.0
    counts = count_parameters(model)
    one_layer = 1 / model.num_layers
    ffn_router = model.num_layers * ffn_router_parameters(model)
    experts = 0
    if isinstance(model.ffn, MoeConfig) and parallel.dp_shard == 1:
        experts = counts.ffn // parallel.ep
    ffn = ffn_router + (experts if isinstance(model.ffn, MoeConfig) else counts.ffn)
    attention = counts.attention + counts.routers - ffn_router
    attention_live = 1.0 if step.activation_checkpointing == "none" else one_layer
    ffn_live = one_layer if step.activation_checkpointing == "full" else 1.0
    live = attention * (attention_live + one_layer) + ffn * (ffn_live + one_layer)
    return 2.0 * (live + model.vocab_size * model.d_model)


def _activations_bytes(model: ModelConfig, parallel: ParallelConfig, step: StepShape) -> int:
    """Return what autograd keeps, at its fullest.

    Kept per token and layer: attention half + FFN half (``none``); ``c D`` + losses + FFN half (``selective``); ``c D``
    + losses (``full``), where losses is ``4 (Ea + Ef)``. The recomputed part of one layer comes on top, and so does
    the larger of two passing needs: the FFN backward's two hidden tensors, ``2 c N H / (ep * chunks)``, or the loss's
    chunk of logits with its weight gradient. The head keeps ``2 c T D + 4 V D``.
    """
    c, d_model, num_tokens = COMPUTE_BYTES[step.dtype], model.d_model, step.num_tokens_per_micro_step
    attention, ffn = _attention_bytes_per_token(model, c), _ffn_bytes_per_token(model, c)
    kept, recomputed = {
        "none": (attention + ffn, 0),
        "selective": (c * d_model + _loss_bytes_per_token(model.attention) + ffn, attention),
        "full": (
            c * d_model + _loss_bytes_per_token(model.attention) + _loss_bytes_per_token(model.ffn),
            attention + ffn,
        ),
    }[step.activation_checkpointing]
    layers = num_tokens * (model.num_layers * kept + recomputed)
    head_matrix = model.vocab_size * d_model
    head = num_tokens * 2 * c * d_model + 4 * head_matrix
    passing = max(
        2 * c * num_tokens * total_d_ff(model.ffn) // parallel.exchange_chunks,
        3 * 4 * max(LOSS_CHUNK_ELEMENTS, LOSS_CHUNK_ROWS * model.vocab_size) + c * head_matrix,
    )
    return layers + head + passing


def _attention_bytes_per_token(model: ModelConfig, c: int) -> int:
    """Return one layer's attention half: norm ``2 c D``, q, out ``2 c A``, k, v ``2 c G``, scores' sums ``4 Q``.

    A mixture adds the gated output ``c A`` and its router.
    """
    attention = model.attention
    width, kv_width = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    total = 2 * c * model.d_model + 2 * c * width + 2 * c * kv_width + 4 * attention.num_heads
    if isinstance(attention, MoaConfig):
        total += c * width + _router_bytes_per_token(model, attention, c)
    return total


def _ffn_bytes_per_token(model: ModelConfig, c: int) -> int:
    """Return one layer's FFN half: norm ``2 c D``, pre-activations ``m c H``, and a mixture's router.

    A dense FFN, left to autograd, also keeps its activation: ``(m + 1 + (m - 1)) c H``.
    """
    num_branches = 2 if model.ffn.activation == "swiglu" else 1
    hidden = num_branches * c * total_d_ff(model.ffn)
    total = 2 * c * model.d_model + hidden
    if isinstance(model.ffn, MoeConfig):
        return total + _router_bytes_per_token(model, model.ffn, c)
    return total + hidden


def _router_bytes_per_token(model: ModelConfig, mixture: MoaConfig | MoeConfig, c: int) -> int:
    """Return one router's part: MLP ``(c + 4) h``, or a float32 copy of the input; probabilities and gates; losses."""
    d_hidden = mixture.router.d_hidden
    if d_hidden is None:
        # Scores are float32: a bfloat16 input is kept as a float32 copy.
        inputs = 4 * model.d_model if c == 2 else 0
    else:
        inputs = (c + 4) * d_hidden
    return inputs + 2 * 4 * mixture.num_experts + _loss_bytes_per_token(mixture)


def _loss_bytes_per_token(mixture: GqaConfig | DenseFfnConfig | MoaConfig | MoeConfig) -> int:
    """Return what the mutual-information loss keeps of one layer's router: its gradient, in float32."""
    return 4 * mixture.num_experts if isinstance(mixture, MoaConfig | MoeConfig) else 0


def _gathered_tokens_bytes(model: ModelConfig, parallel: ParallelConfig, step: StepShape) -> int:
    """Return the bytes of other ranks' tokens, 0 for ep = 1.

    ``c N D`` per layer that keeps them for its backward pass (all; with full checkpointing one), and two such arrays,
    one chunk long, on their way in and out.
    """
    if parallel.ep == 1 or not isinstance(model.ffn, MoeConfig):
        return 0
    one = COMPUTE_BYTES[step.dtype] * step.num_tokens_per_micro_step * parallel.ep * model.d_model
    num_layers = 1 if step.activation_checkpointing == "full" else model.num_layers
    return one * num_layers + 2 * one // parallel.exchange_chunks


def _exchange_per_layer_bytes(model: ModelConfig, parallel: ParallelConfig, step: StepShape) -> int:
    if not isinstance(model.ffn, MoeConfig):
        return 0
    tokens = COMPUTE_BYTES[step.dtype] * model.d_model
    gates = 4 * model.ffn.num_experts
    own_gates = gates // parallel.ep
    forward = 2 * tokens + (gates if parallel.device == "cuda" else own_gates)
    backward = 2 * tokens + own_gates
    num_forwards = 2 if step.activation_checkpointing == "full" else 1
    per_token = num_forwards * forward + backward
    return (parallel.ep - 1) * step.num_tokens_per_micro_step * per_token * step.num_micro_steps


def _ring_share(num_ranks: int) -> float:
    return (num_ranks - 1) / num_ranks
