"""Which parameter lies on which mesh axis, and who sums its gradient. A plan without effects; imports no torch.

| parameter | cut over | gradient summed over |
| --- | --- | --- |
| FFN experts | ``ep``, ``dp_shard`` | ``ep`` by the exchange; ``dp_shard`` > 1: the rest by FSDP2, else by us |
| trunk, ``replicate`` | nothing | all axes, by us |
| trunk, ``shard`` | ``dp_shard x ep`` | all axes, by FSDP2 |

Gradients are summed, never averaged: the loss is divided by the number of tokens of the whole batch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsmoe_ray.parallel.config import ParallelConfig

_EXPERT_WEIGHT = re.compile(r"(^|\.)ffn\.experts\.w[123]$")


@dataclass(frozen=True)
class ParameterPlan:
    """Where one parameter lies."""

    shard_axes: tuple[str, ...]
    """Axes over which it is cut along its first dimension; along all others it is copied."""
    managed_by_fsdp: bool
    """FSDP2 gathers its parts and sums its gradient over the data-parallel axes."""
    reduce_axes: tuple[str, ...]
    """Axes over which its gradient is still to be summed after the backward pass."""

    def is_counted_on(self, coordinates: Mapping[str, int]) -> bool:
        """Return whether a rank counts its part in a sum over all ranks; each element has exactly one such rank."""
        return all(position == 0 for axis, position in coordinates.items() if axis not in self.shard_axes)


def is_expert_weight(name: str) -> bool:
    """Return whether a parameter's name is that of FFN experts; all others belong to the trunk."""
    return _EXPERT_WEIGHT.search(name) is not None


def plan_parameter(name: str, config: ParallelConfig) -> ParameterPlan:
    """Return the plan of one parameter; axes of one rank are left out."""
    experts_use_fsdp = config.dp_shard > 1
    if is_expert_weight(name):
        return ParameterPlan(
            shard_axes=_present(config, "dp_shard", "ep"),
            managed_by_fsdp=experts_use_fsdp,
            reduce_axes=() if experts_use_fsdp else _present(config, "dp_replicate"),
        )
    trunk_uses_fsdp = config.trunk == "shard" and config.dp_shard * config.ep > 1
    return ParameterPlan(
        shard_axes=_present(config, "dp_shard", "ep") if trunk_uses_fsdp else (),
        managed_by_fsdp=trunk_uses_fsdp,
        reduce_axes=() if trunk_uses_fsdp else _present(config, "dp_replicate", "dp_shard", "ep"),
    )


def _present(config: ParallelConfig, *axes: str) -> tuple[str, ...]:
    return tuple(axis for axis in axes if getattr(config, axis) > 1)
