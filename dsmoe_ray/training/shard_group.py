"""The shards of a run as the coordinator sees them: what they are made from, what they tell, and how a group of them is
called. A cluster's are in ``ray_shard_group.py``, scripted ones in the tests.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.states import Call


@dataclass(frozen=True)
class ShardSetup:
    """What every shard of a run is made from."""

    config: TrainingRunConfig
    data: Path
    """Directory of the training token shards."""
    held_out: Path | None
    checkpoints: Path
    device: str
    """``cpu`` or ``cuda``; Ray shows a shard only the GPU that was reserved for it."""


@dataclass(frozen=True)
class ShardDescription:
    """What the others must know of a shard before they meet."""

    host: str
    address: str
    """Of its node, as the cluster knows it."""
    node_id: str
    process_id: int
    free_port: int
    probe: str | None
    """What it read from the probe file."""


@dataclass(frozen=True)
class ShardStatus:
    """What a shard says of itself while it works."""

    step: int
    busy_s: float | None
    """How long its current step has been running; None between steps."""


class ShardGroup(Protocol):
    """Processes, one for each rank, that answer calls."""

    num_shards: int

    def launch(self, ranks: Sequence[int]) -> None:
        """Begin to start processes for these ranks, putting an end to those they had; does not wait for them."""

    def ask(self, method: str, *arguments: Any, ranks: Sequence[int] | None = None) -> Call:
        """Call a method of ``ExpertShardWorker`` on these ranks, by default all. Each answers its calls in order."""

    def close(self) -> None:
        """End all processes and give back what was reserved for them."""
