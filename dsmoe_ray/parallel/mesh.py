"""The grid of ranks: which axes it has, where a rank stands on each, and the process groups along them.

Ranks are numbered with ``ep`` fastest, so that the ranks that share out one layer's experts are neighbours in a node.
Joining and leaving is the business of ``collectives.py``.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from dsmoe_ray.parallel.config import ParallelConfig

AXES = ("dp_replicate", "dp_shard", "ep")
"""Axes of every mesh, slowest first."""


@dataclass(frozen=True)
class World:
    """One rank's view of all ranks."""

    rank: int
    config: ParallelConfig
    device: torch.device
    mesh: DeviceMesh | None
    """Axes ``dp_replicate, dp_shard, ep``, always all three; None for one rank alone, which has no process groups."""
    backend: Literal["gloo", "nccl"]
    """What carries tensors of ``device``."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.config.world_size

    @property
    def ep_rank(self) -> int:
        """Position among the ranks that share out the experts of a layer."""
        return self.coordinate("ep")

    def coordinate(self, axis: str) -> int:
        """Return this rank's position along an axis."""
        return axis_coordinates(self.config, self.rank)[axis]

    def group(self, axis: str) -> distributed.ProcessGroup:
        """Return the ranks that differ from this one along one axis only."""
        if self.mesh is None:
            raise ValueError(f"a world of one rank has no process group along {axis!r}")
        return self.mesh.get_group(axis)


def axis_coordinates(config: ParallelConfig, rank: int) -> dict[str, int]:
    """Return a rank's position along each axis."""
    if not 0 <= rank < config.world_size:
        raise ValueError(f"rank must be in [0, {config.world_size}); got {rank}")
    return {
        "dp_replicate": rank // (config.dp_shard * config.ep),
        "dp_shard": rank // config.ep % config.dp_shard,
        "ep": rank % config.ep,
    }


def build_mesh(config: ParallelConfig, device: torch.device) -> DeviceMesh:
    """Make the process groups along each axis; every rank of an initialised world must call it."""
    ranks = torch.arange(config.world_size).view(config.dp_replicate, config.dp_shard, config.ep)
    return DeviceMesh(device.type, ranks, mesh_dim_names=AXES)


def build_trunk_mesh(world: World) -> DeviceMesh:
    """Make the mesh over which FSDP2 shards the trunk: ``dp_shard x ep`` as one axis, within each copy of the model."""
    config = world.config
    shape = (config.dp_replicate, config.dp_shard * config.ep)
    ranks = torch.arange(config.world_size).view(shape)
    mesh = DeviceMesh(world.device.type, ranks, mesh_dim_names=("dp_replicate", "trunk_shard"))
    return mesh if config.dp_replicate > 1 else mesh["trunk_shard"]
