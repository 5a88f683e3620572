"""What a decode step reads and computes, and how long that takes at best: the yardstick of sparse decoding.

A step reads the weights that its batch uses once, the experts that at least one of its tokens selects among them, and
the keys and values of every sequence; it computes what each token uses. The longer of both times is the bound.
"""

from dataclasses import dataclass
from typing import Any

import torch

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.model.accounting import (
    ALL_EXPERTS,
    KeptExperts,
    compute_decode_bytes,
    compute_forward_flops,
    count_kept,
)
from dsmoe_ray.model.config import ModelConfig, MoeConfig
from dsmoe_ray.model.dispatch import ExpertAssignment, ExpertBackend

_BANDWIDTH_ELEMENTS = 1 << 27
_BANDWIDTH_REPEATS = 5


@dataclass(frozen=True)
class StepCost:
    """One decode step of a batch."""

    num_bytes: float
    flops: float

    def time_s(self, *, bytes_per_s: float, flops_per_s: float) -> float:
        """Return how long it takes at least."""
        return max(self.num_bytes / bytes_per_s, self.flops / flops_per_s)


def compute_step_cost(
    config: ModelConfig, *, batch_size: int, context_tokens: float, distinct_experts: float | None, weight_bytes: int
) -> StepCost:
    """Return what a decode step costs.

    Args:
        config: The model; its deployed routing says how many experts a token keeps.
        batch_size: Sequences, a token each.
        context_tokens: Positions in the KV cache, on average.
        distinct_experts: FFN experts of a layer that the batch uses together; None for a dense FFN.
        weight_bytes: Bytes of one weight and of one cached number.
    """
    used = KeptExperts(ffn=distinct_experts)
    weights = compute_decode_bytes(config, context_tokens=0, kept=used, weight_bytes=weight_bytes)
    cached = compute_decode_bytes(
        config, context_tokens=round(context_tokens), kept=used, weight_bytes=weight_bytes, cache_bytes=weight_bytes
    )
    flops = compute_forward_flops(config, context_tokens=context_tokens, kept=find_kept(config))
    return StepCost(weights + batch_size * (cached - weights), batch_size * flops)


def find_kept(config: ModelConfig) -> KeptExperts:
    """Return how many FFN experts a token uses as the model is deployed."""
    if not isinstance(config.ffn, MoeConfig):
        return ALL_EXPERTS
    return KeptExperts(ffn=count_kept(config.ffn.router.inference, config.ffn.num_experts))


def measure_read_bytes_per_s() -> float:
    """Return the rate at which all threads together read memory, of the fastest of several passes."""
    values = torch.ones(_BANDWIDTH_ELEMENTS)
    durations_s = []
    for _ in range(_BANDWIDTH_REPEATS):
        start_s = monotonic_s()
        torch.dot(values, values)
        durations_s.append(monotonic_s() - start_s)
    return values.nbytes / min(durations_s)


class CountingExperts:
    """An ``ExpertBackend`` that counts the distinct experts of decode steps and leaves the work to another."""

    def __init__(self, experts: ExpertBackend, *, batch_size: int) -> None:
        self._experts, self._batch_size = experts, batch_size
        self._num_distinct = self._num_calls = 0

    def dispatch(self, layer: int, x_TD: torch.Tensor, assignment: ExpertAssignment) -> Any:
        """Count and pass on."""
        if len(x_TD) == self._batch_size:
            ids_TK = assignment.expert_ids_TK
            self._num_distinct += len(ids_TK[ids_TK >= 0].unique())
            self._num_calls += 1
        return self._experts.dispatch(layer, x_TD, assignment)

    def combine(self, handle: Any) -> torch.Tensor:
        """Pass on."""
        return self._experts.combine(handle)

    @property
    def mean_distinct(self) -> float:
        """Return the distinct experts of a layer and decode step, on average."""
        return self._num_distinct / self._num_calls
