"""How a bench is to measure, the same for all of its rows. Pure data; imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dsmoe_ray.bench.measure import Turns


@dataclass(frozen=True)
class Settings:
    """What the person asked for."""

    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = 2
    """Compute threads in total; two shards share them."""
    num_pairs: int = 8
    quick: bool = False
    """A look, not a measurement: fewer pairs, one step a turn."""

    peers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Other engines by name: the command that starts the worker of each, without model and type."""

    def turns(self, *, steps_per_turn: int = 1) -> Turns:
        """Return how often sides take turns, with the turn length that suits a full measurement."""
        if self.quick:
            return Turns(num_pairs=min(self.num_pairs, 3), steps_per_turn=1, warmup_steps=1)
        return Turns(num_pairs=self.num_pairs, steps_per_turn=steps_per_turn, warmup_steps=2)
