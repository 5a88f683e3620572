"""The runner for CPUs, on compiled kernels: all layers in one call, or, where experts are elsewhere, one for the trunk
of each layer.

Weights are used where they lie, in the mapped files of the artifact. Numerics are exact in either mode: a kernel sums
each output in one order whatever else it computes; only the mean that ``threshold_top_k`` takes differs.

Shape suffixes: T tokens of a step, R rows whose logits are wanted, D model width, E experts, V vocabulary, G KV heads.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.inference.cpu_experts import CpuExperts
from dsmoe_ray.inference.cpu_library import (
    BLOCK_SIZE,
    DTYPES,
    MAX_STREAMED,
    STEP_MEMORY,
    LayerWeights,
    Model,
    RouterWeights,
    Rule,
    Step,
    count_partial,
    load_kernels,
    point,
    reference,
)
from dsmoe_ray.model.attention import GqaAttention
from dsmoe_ray.model.config import GqaConfig, ModelConfig, MoeConfig, RoutingConfig, RoutingMode
from dsmoe_ray.model.dispatch import ExpertAssignment, ExpertBackend
from dsmoe_ray.model.layer_routing import LayerRouting
from dsmoe_ray.model.moe import DenseFfn
from dsmoe_ray.model.router import Router
from dsmoe_ray.model.transformer import Transformer

# In the order of ``RuleMode`` of the kernels.
_MODES = (
    RoutingMode.DENSE,
    RoutingMode.TOP_K,
    RoutingMode.THRESHOLD,
    RoutingMode.THRESHOLD_TOP_K,
    RoutingMode.TOP_P,
)
# Distinct combinations of rules that are kept ready for the kernels.
_MAX_RULE_TABLES = 256


class CpuRunner:
    """A model on a CPU with its paged KV cache; see ``inference/runner.py``."""

    block_size = BLOCK_SIZE

    def __init__(
        self,
        model: Transformer,
        *,
        num_blocks: int,
        max_tokens: int,
        max_seqs: int,
        numerics: Literal["exact", "fast"] = "exact",
        num_threads: int | None = None,
        experts: ExpertBackend | None = None,
    ) -> None:
        """Take the weights of ``model`` where they lie.

        Args:
            model: Its weights, float32 or bfloat16, decide what is computed in.
            num_blocks: Blocks of the KV cache.
            max_tokens: Most tokens of a step.
            max_seqs: Most sequences of a step.
            numerics: See ``EngineConfig``.
            num_threads: By default as many as PyTorch uses.
            experts: Where FFN experts are computed; by default here.

        Raises:
            KernelsUnavailableError: the kernels cannot be built on this machine.
        """
        self.config, self.num_blocks = model.config, num_blocks
        self._max_tokens, self._max_seqs = max_tokens, max_seqs
        num_threads = num_threads or torch.get_num_threads()
        dtype = model.embedding.weight.dtype
        self._kernels = load_kernels()
        self.experts = experts or CpuExperts(model, max_tokens=max_tokens, num_threads=num_threads)
        self._transformer = model
        self._cache = _allocate_cache(model.config, num_blocks, dtype)
        self._model = _describe_model(model, self._cache, num_threads, mean_over_step=numerics == "fast")
        self._memory = _allocate_memory(model.config, dtype, max_tokens, max_seqs)
        self._inputs = {
            "tokens": np.empty(max_tokens, np.int32),
            "query_starts": np.empty(max_seqs + 1, np.int32),
            "first_positions": np.empty(max_seqs, np.int32),
            "rule_idxs": np.empty(max_seqs, np.int32),
        }
        self._step = Step(**{name: point(tensor) for name, tensor in self._memory.items()})
        for name, array in self._inputs.items():
            setattr(self._step, name, array.ctypes.data)
        self._rule_tables: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self._model_ref, self._step_ref = reference(self._model), reference(self._step)

    @property
    def kv_cache_bytes(self) -> int:
        """Return the memory of all blocks."""
        return self._cache.nbytes

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute one step; see ``ModelRunner.run``."""
        self._take(batch)
        if isinstance(self.experts, CpuExperts):
            self._run_all_layers(self.experts)
        else:
            for _ in self._run_layers():
                pass
        rows_R = np.ascontiguousarray(batch.logits_rows_R, np.int32)
        logits_RV = torch.empty(len(rows_R), self.config.vocab_size)
        self._kernels.dsmoe_finish(
            self._model_ref, self._step_ref, rows_R.ctypes.data, len(rows_R), logits_RV.data_ptr()
        )
        return logits_RV

    def watch_routing(self) -> np.ndarray:
        """Return a number, ``(1,)`` float64, that grows by the seconds that routers, selection and grouping take."""
        self._routing_s = np.zeros(1)
        self._step.routing_s = self._routing_s.ctypes.data
        if isinstance(self.experts, CpuExperts):
            self.experts.watch_routing(self._routing_s)
        return self._routing_s

    def _run_all_layers(self, experts: CpuExperts) -> None:
        """Run all layers in one call: with experts here there is nothing to wait for between two calls."""
        y_TD = self._y_TD = torch.empty(self._step.num_tokens, self.config.d_model)
        self._step.y = y_TD.data_ptr()
        experts.bind(*self._expert_inputs(), y_TD)
        self._kernels.dsmoe_layers(self._model_ref, self._step_ref, *experts.addresses)

    def _expert_inputs(self) -> tuple[torch.Tensor, ExpertAssignment]:
        names = ("normed_cast", "expert_ids", "gates")
        x_TD, ids_TE, gates_TE = (self._memory[name][: self._step.num_tokens] for name in names)
        return x_TD, ExpertAssignment(ids_TE, gates_TE)

    def _run_layers(self) -> Iterator[None]:
        """Run the trunk of one layer after another, pausing while the experts of each work elsewhere."""
        x_TD, assignment = self._expert_inputs()
        self._kernels.dsmoe_embed(self._model_ref, self._step_ref)
        for layer in range(self.config.num_layers):
            self._kernels.dsmoe_trunk(self._model_ref, self._step_ref, layer)
            handle = self.experts.dispatch(layer, x_TD, assignment)
            yield
            # The next layer's trunk begins by adding it, in float32 whatever came.
            y_TD = self.experts.combine(handle).float().contiguous()
            self._step.y = y_TD.data_ptr()
        # Until the last sum is added it must stay alive.
        self._y_TD = y_TD

    def _take(self, batch: ForwardBatch) -> None:
        step, inputs = self._step, self._inputs
        num_tokens, num_sequences = batch.num_tokens, batch.num_sequences
        self._check_limits(num_tokens, num_sequences, len(batch.rules))
        inputs["tokens"][:num_tokens] = batch.token_ids_T
        inputs["query_starts"][: num_sequences + 1] = batch.query_starts
        inputs["first_positions"][:num_sequences] = batch.first_positions_B
        inputs["rule_idxs"][:num_sequences] = batch.rule_idxs_B
        self._tables = tables = np.ascontiguousarray(batch.block_tables, np.int32)
        step.block_tables = tables.ctypes.data
        step.num_tokens, step.num_sequences, step.max_blocks = num_tokens, num_sequences, tables.shape[1]
        step.num_rules = len(batch.rules)
        step.rules = ctypes.addressof(self._describe_rules(batch.rules))

    def _check_limits(self, num_tokens: int, num_sequences: int, num_rules: int) -> None:
        """Refuse what the memory of a step, which the kernels write without looking, has no room for."""
        if num_tokens > self._max_tokens or num_sequences > self._max_seqs or num_rules > self._max_seqs:
            raise ValueError(
                f"a step has {num_tokens} tokens of {num_sequences} sequences with {num_rules} routing rules; this "
                f"runner takes up to max_tokens={self._max_tokens} of max_seqs={self._max_seqs} and as many rules"
            )

    def _describe_rules(self, rules: Sequence[Sequence[LayerRouting]]) -> Any:
        """Return the rules as the kernels read them, (layers, rules, 2)."""
        key = tuple(map(id, rules))
        if key not in self._rule_tables:
            if len(self._rule_tables) == _MAX_RULE_TABLES:
                self._rule_tables.clear()
            layers = range(self.config.num_layers)
            flat = [_describe_rule(part) for layer in layers for rule in rules for part in rule[layer]]
            # The rules themselves are kept too, so that no other object gets their id.
            self._rule_tables[key] = ((Rule * len(flat))(*flat), rules)
        return self._rule_tables[key][0]


def count_block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the memory of one block of the KV cache, all layers together; heads are padded to whole vectors."""
    return (
        2 * config.num_layers * config.attention.num_kv_heads * BLOCK_SIZE * _padded_head_dim(config) * dtype.itemsize
    )


def _padded_head_dim(config: ModelConfig) -> int:
    return -(-config.attention.head_dim // BLOCK_SIZE) * BLOCK_SIZE


def _allocate_cache(config: ModelConfig, num_blocks: int, dtype: torch.dtype) -> torch.Tensor:
    shape = (config.num_layers, 2, num_blocks, config.attention.num_kv_heads, BLOCK_SIZE * _padded_head_dim(config))
    # Zeros: channels that only pad a head are read with the others.
    return torch.zeros(shape, dtype=dtype)


def _allocate_memory(
    config: ModelConfig, dtype: torch.dtype, max_tokens: int, max_seqs: int
) -> dict[str, torch.Tensor]:
    attention, ffn = config.attention, config.ffn
    heads, kv = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    attention_experts = 0 if isinstance(attention, GqaConfig) else attention.num_experts
    # A dense FFN is one expert that every token uses, with a gate of one.
    num_experts = ffn.num_experts if isinstance(ffn, MoeConfig) else 1
    routers = [part.router for part in (attention, ffn) if hasattr(part, "router")]
    widths = {
        **dict.fromkeys(("x", "normed", "normed_cast"), config.d_model),
        "q": heads,
        "kv": 2 * kv,
        "attended": heads,
        "router_hidden": max((router.d_hidden or 0 for router in routers), default=0),
        "router_probs": max(attention_experts, num_experts),
        "attention_gates": attention_experts,
        **dict.fromkeys(("expert_ids", "gates"), num_experts),
        "sequence_of": 1,
        "tiles": 2,
    }
    dtypes = dict.fromkeys(("normed_cast", "attended"), dtype) | dict.fromkeys(
        ("expert_ids", "sequence_of", "tiles"), torch.int32
    )
    memory = {name: torch.empty(max_tokens, width, dtype=dtypes.get(name)) for name, width in widths.items()}
    memory["expert_ids"].zero_()
    memory["gates"].fill_(1.0)
    memory["partial"] = torch.empty(count_partial(min(max_tokens, MAX_STREAMED), heads, config.d_model))
    memory["rule_top_k"] = torch.empty(max_seqs, dtype=torch.int32)
    assert set(memory) == set(STEP_MEMORY)
    return memory


def _describe_model(model: Transformer, cache: torch.Tensor, num_threads: int, *, mean_over_step: bool) -> Model:
    config = model.config
    attention = config.attention
    layers = (LayerWeights * config.num_layers)()
    for index, block in enumerate(model.blocks):
        layers[index] = _describe_layer(block, cache[index])
    head = model.embedding if model.head is None else model.head
    return Model(
        dtype=DTYPES[model.embedding.weight.dtype],
        d_model=config.d_model,
        num_layers=config.num_layers,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        heads_interleaved=not isinstance(attention, GqaConfig),
        vocab_size=config.vocab_size,
        num_threads=num_threads,
        mean_over_step=mean_over_step,
        norm_eps=config.norm_eps,
        cos=point(model.cos),
        sin=point(model.sin),
        layers=layers,
        embedding=point(model.embedding.weight),
        head=point(head.weight),
        norm=point(model.norm.weight),
    )


def _describe_layer(block: Any, cache: torch.Tensor) -> LayerWeights:
    attention = block.attention
    return LayerWeights(
        attention_norm=point(block.attention_norm.weight),
        ffn_norm=point(block.ffn_norm.weight),
        wq=point(attention.wq),
        wk=point(attention.wk),
        wv=point(attention.wv),
        wo=point(attention.wo),
        attention_router=_describe_router(None if isinstance(attention, GqaAttention) else attention.router),
        ffn_router=_describe_router(None if isinstance(block.ffn, DenseFfn) else block.ffn.router),
        k_cache=point(cache[0]),
        v_cache=point(cache[1]),
    )


def _describe_router(router: Router | None) -> RouterWeights:
    if router is None:
        return RouterWeights()
    return RouterWeights(
        hidden=None if router.hidden is None else point(router.hidden.weight),
        proj=point(router.proj.weight),
        d_hidden=router.config.d_hidden or 0,
        num_experts=router.proj.out_features,
        gate_scale=router.config.gate_scale,
        renormalize=router.config.gates == "renormalized",
    )


def _describe_rule(rule: RoutingConfig) -> Rule:
    value = rule.top_p if rule.top_p is not None else rule.threshold
    return Rule(mode=_MODES.index(rule.mode), top_k=rule.top_k or 0, value=value or 0.0)
