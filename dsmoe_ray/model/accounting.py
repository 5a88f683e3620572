"""How large a model is and what a token costs: parameters, FLOPs and bytes. Arithmetic on a config; imports no torch.

Matrices are counted as ``2 * rows * columns`` FLOPs per token; element-wise work (norms, activations, softmax, gates)
is left out, as is usual. The router's bias-free matrices count like any other.
"""

from dataclasses import dataclass
from typing import Literal

from dsmoe_ray.model.config import FfnConfig, GqaConfig, MoaConfig, ModelConfig, MoeConfig, RoutingConfig, RoutingMode

ActivationCheckpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class KeptExperts:
    """Experts a token uses in every layer, on average; None means all of them, and fits layers without a mixture."""

    attention: float | None = None
    ffn: float | None = None


ALL_EXPERTS = KeptExperts()


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part, over all layers."""

    embedding: int
    head: int
    """Zero when tied to the embedding."""
    attention: int
    ffn: int
    routers: int
    norms: int

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.non_embedding

    @property
    def non_embedding(self) -> int:
        """All but the embedding and the output head: what the paper reports."""
        return self.attention + self.ffn + self.routers + self.norms


def count_parameters(config: ModelConfig, *, kept: KeptExperts = ALL_EXPERTS) -> ParameterCounts:
    """Count the parameters of a model, or those that one token uses.

    Args:
        config: The model.
        kept: Experts in use; keys and values of attention, routers and norms are used whatever is kept. Fractions of
            a parameter are rounded.

    Returns:
        Counts summed over layers; embedding and head are counted whole in either case.
    """
    layers = config.num_layers
    shared_attention, expert_attention = _attention_parameters(config)
    return ParameterCounts(
        embedding=config.vocab_size * config.d_model,
        head=0 if config.tie_embeddings else config.vocab_size * config.d_model,
        attention=round(layers * (shared_attention + expert_attention * _attention_share(config, kept))),
        ffn=round(layers * _ffn_parameters(config) * _ffn_share(config, kept)),
        routers=layers * (attention_router_parameters(config) + ffn_router_parameters(config)),
        norms=(2 * layers + 1) * config.d_model,
    )


def count_kept(routing: RoutingConfig, num_experts: int) -> float | None:
    """Return how many experts a rule keeps per token and layer, or None where only data can tell (thresholds, top-p).

    Of a table of layers it is the mean.
    """
    if routing.mode is RoutingMode.DENSE:
        return float(num_experts)
    if routing.per_layer_top_k is not None:
        return sum(routing.per_layer_top_k) / len(routing.per_layer_top_k)
    return float(routing.top_k) if routing.top_k is not None else None


def compute_forward_flops(config: ModelConfig, *, context_tokens: float, kept: KeptExperts = ALL_EXPERTS) -> float:
    """Return the FLOPs of one token's forward pass, output head included.

    ``2 * (attention + ffn + routers + vocab_size * d_model) + num_layers * sequence term``, where the sequence term of
    one layer is ``4 * query heads in use * head_dim * context_tokens`` (scores, then their product with the values).

    Args:
        config: The model.
        context_tokens: Keys that a token attends to, itself included, on average; see ``mean_causal_context``.
        kept: Experts in use.
    """
    counts = count_parameters(config, kept=kept)
    matrices = counts.attention + counts.ffn + counts.routers + config.vocab_size * config.d_model
    return 2.0 * matrices + config.num_layers * _sequence_flops(config, context_tokens, kept)


def compute_training_flops(
    config: ModelConfig,
    *,
    seq_len: int,
    kept: KeptExperts = ALL_EXPERTS,
    activation_checkpointing: ActivationCheckpointing = "none",
) -> float:
    """Return the FLOPs per token of one training step: three times the forward pass, plus what is computed again.

    Recomputation adds the forward pass of all layers (``full``) or of their attention (``selective``). Leave it at
    ``none`` for the useful FLOPs that utilisation is measured by.
    """
    context_tokens = mean_causal_context(seq_len)
    forward = compute_forward_flops(config, context_tokens=context_tokens, kept=kept)
    recomputed = 0.0
    if activation_checkpointing == "full":
        recomputed = forward - 2.0 * config.vocab_size * config.d_model
    elif activation_checkpointing == "selective":
        attention = count_parameters(config, kept=kept).attention
        attention += config.num_layers * attention_router_parameters(config)
        recomputed = 2.0 * attention + config.num_layers * _sequence_flops(config, context_tokens, kept)
    return 3.0 * forward + recomputed


def mean_causal_context(seq_len: int) -> float:
    """Return how many keys a token of a causal sequence sees on average, itself included."""
    return (seq_len + 1) / 2


def compute_decode_bytes(
    config: ModelConfig,
    *,
    context_tokens: int,
    kept: KeptExperts = ALL_EXPERTS,
    weight_bytes: int = 2,
    cache_bytes: int = 2,
) -> float:
    """Return the bytes read to decode one token of one sequence: the bound of memory-bound decoding at batch 1.

    ``weight_bytes * (parameters in use + head matrix + one embedding row)
    + cache_bytes * num_layers * 2 * num_kv_heads * head_dim * context_tokens``

    Args:
        config: The model.
        context_tokens: Positions in the KV cache.
        kept: Experts in use. For a batch, give the distinct experts that it touches and divide by its size.
        weight_bytes: Bytes of one stored weight.
        cache_bytes: Bytes of one cached number.
    """
    weights = count_parameters(config, kept=kept).non_embedding + (config.vocab_size + 1) * config.d_model
    cached = config.num_layers * 2 * config.attention.num_kv_heads * config.attention.head_dim * context_tokens
    return float(weight_bytes * weights + cache_bytes * cached)


def attention_router_parameters(config: ModelConfig) -> int:
    """Return the parameters of one layer's attention router; 0 without one."""
    return _router_parameters(config.attention, config.d_model)


def ffn_router_parameters(config: ModelConfig) -> int:
    """Return the parameters of one layer's FFN router; 0 without one."""
    return _router_parameters(config.ffn, config.d_model)


def total_d_ff(ffn: FfnConfig) -> int:
    """Return the hidden width of all experts of a layer together."""
    return ffn.num_experts * ffn.d_ff if isinstance(ffn, MoeConfig) else ffn.d_ff


def _router_parameters(mixture: GqaConfig | MoaConfig | FfnConfig, d_model: int) -> int:
    if not isinstance(mixture, MoaConfig | MoeConfig):
        return 0
    d_hidden = mixture.router.d_hidden
    if d_hidden is None:
        return d_model * mixture.num_experts
    return d_model * d_hidden + d_hidden * mixture.num_experts


def _attention_parameters(config: ModelConfig) -> tuple[int, int]:
    """Return one layer's parameters of keys and values, and of queries and outputs."""
    attention = config.attention
    per_head = config.d_model * attention.head_dim
    return 2 * attention.num_kv_heads * per_head, 2 * attention.num_heads * per_head


def _ffn_parameters(config: ModelConfig) -> int:
    num_matrices = 3 if config.ffn.activation == "swiglu" else 2
    return num_matrices * config.d_model * total_d_ff(config.ffn)


def _attention_share(config: ModelConfig, kept: KeptExperts) -> float:
    attention = config.attention
    if kept.attention is None or not isinstance(attention, MoaConfig):
        return 1.0
    return kept.attention / attention.num_experts


def _ffn_share(config: ModelConfig, kept: KeptExperts) -> float:
    if kept.ffn is None or not isinstance(config.ffn, MoeConfig):
        return 1.0
    return kept.ffn / config.ffn.num_experts


def _sequence_flops(config: ModelConfig, context_tokens: float, kept: KeptExperts) -> float:
    heads = config.attention.num_heads * _attention_share(config, kept)
    return 4.0 * heads * config.attention.head_dim * context_tokens
