"""The tokens of one step as the compiled kernels read them, and the memory that they work in.

Shape suffixes: T tokens of a step, D model width, E experts.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.inference.cpu_library import MAX_STREAMED, STEP_MEMORY, Rule, Step, count_partial, point, reference
from dsmoe_ray.inference.int8_weights import INPUT_BLOCK
from dsmoe_ray.model.config import GqaConfig, ModelConfig, MoeConfig, RoutingConfig, RoutingMode
from dsmoe_ray.model.dispatch import ExpertAssignment
from dsmoe_ray.model.layer_routing import LayerRouting

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


class CpuStep:
    """Memory for steps of one size, filled by one step after another."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, max_tokens: int, max_seqs: int) -> None:
        self._config, self._max_tokens, self._max_seqs = config, max_tokens, max_seqs
        self._is_int8 = dtype == torch.int8
        self._memory = _allocate_memory(config, dtype, max_tokens, max_seqs)
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
        self.address = reference(self._step)
        """As the kernels take it."""

    @property
    def num_tokens(self) -> int:
        """Return how many tokens the present step has."""
        return int(self._step.num_tokens)

    def watch_routing(self, total_s: np.ndarray) -> None:
        """Let the one number of ``total_s``, float64, grow by the time that routers and selection take."""
        self._total_s = total_s
        self._step.routing_s = total_s.ctypes.data

    def expert_inputs(self) -> tuple[torch.Tensor, ExpertAssignment]:
        """Return what FFN experts are given; the kernels write it anew in every layer."""
        # Whoever has experts of int8 rounds tokens by itself.
        names = ("normed" if self._is_int8 else "normed_cast", "expert_ids", "gates")
        x_TD, ids_TE, gates_TE = (self._memory[name][: self.num_tokens] for name in names)
        return x_TD, ExpertAssignment(ids_TE, gates_TE)

    def take_outputs(self, y_TD: torch.Tensor) -> None:
        """Have the kernels add what experts gave, float32 and contiguous, where they go on; keeps it until then."""
        self._y_TD = y_TD
        self._step.y = y_TD.data_ptr()

    def take(self, batch: ForwardBatch) -> None:
        """Take over a step.

        Raises:
            ValueError: there is no room for it in memory, which the kernels write without looking.
        """
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
            layers = range(self._config.num_layers)
            flat = [_describe_rule(part) for layer in layers for rule in rules for part in rule[layer]]
            # The rules themselves are kept too, so that no other object gets their id.
            self._rule_tables[key] = ((Rule * len(flat))(*flat), rules)
        return self._rule_tables[key][0]


def _allocate_memory(
    config: ModelConfig, dtype: torch.dtype, max_tokens: int, max_seqs: int
) -> dict[str, torch.Tensor]:
    attention, ffn = config.attention, config.ffn
    heads, kv = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    attention_experts = 0 if isinstance(attention, GqaConfig) else attention.num_experts
    # A dense FFN is one expert that every token uses, with a gate of one.
    num_experts = ffn.num_experts if isinstance(ffn, MoeConfig) else 1
    routers = [part.router for part in (attention, ffn) if hasattr(part, "router")]
    is_int8 = dtype == torch.int8
    num_rounded = -(-max(config.d_model, heads) // INPUT_BLOCK) if is_int8 else 0
    widths = {
        **dict.fromkeys(("x", "normed"), config.d_model),
        "normed_cast": 0 if is_int8 else config.d_model,
        "rounded": num_rounded * INPUT_BLOCK,
        "rounded_scales": num_rounded,
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
    dtypes = {
        **dict.fromkeys(("normed_cast", "attended"), torch.float32 if is_int8 else dtype),
        **dict.fromkeys(("expert_ids", "sequence_of", "tiles"), torch.int32),
        "rounded": torch.int16,
    }
    memory = {name: torch.empty(max_tokens, width, dtype=dtypes.get(name)) for name, width in widths.items()}
    memory["expert_ids"].zero_()
    memory["gates"].fill_(1.0)
    memory["partial"] = torch.empty(count_partial(min(max_tokens, MAX_STREAMED), heads, config.d_model))
    memory["rule_top_k"] = torch.empty(max_seqs, dtype=torch.int32)
    assert set(memory) == set(STEP_MEMORY)
    return memory


def _describe_rule(rule: RoutingConfig) -> Rule:
    value = rule.top_p if rule.top_p is not None else rule.threshold
    return Rule(mode=_MODES.index(rule.mode), top_k=rule.top_k or 0, value=value or 0.0)
