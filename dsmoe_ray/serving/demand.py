"""How many replicas of every expert the autoscaler wants, and the loads that made it want them. Pure data.

It is what a decision about scaling hands to a decision about placement. Shape letter: E logical experts of the model.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from dsmoe_ray.serving.plan import LogicalExpert


@dataclass(frozen=True, kw_only=True)
class ExpertDemand:
    """Replicas wanted per expert. Arrays are never written to."""

    experts: tuple[LogicalExpert, ...]
    """All experts of the model; every array below is in this order."""
    replicas_E: np.ndarray
    """Replicas wanted; 0 leaves an expert on disk until a token wants it."""
    loads_E: np.ndarray
    """Tokens per second that want each expert, averaged."""
    load_errors_E: np.ndarray
    """Standard errors of the loads: what may be chance and is no reason to move an expert."""
    replica_load: float | None = None
    """Tokens per second that one replica should take at most; None before it was measured."""


def index_experts(num_layers: int, num_experts: int) -> tuple[LogicalExpert, ...]:
    """Return all experts of a model whose layers are alike, layer by layer."""
    pairs = itertools.product(range(num_layers), range(num_experts))
    return tuple(LogicalExpert(layer=layer, expert_id=expert_id) for layer, expert_id in pairs)
