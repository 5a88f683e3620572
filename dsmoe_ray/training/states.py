"""Where a run stands, and what is under way between the coordinator and the shards. Plain frozen values, no behaviour.

Each state carries exactly what the next move needs::

    Starting -> Running -> Finished
                Running <-> Checkpointing          a save is on its way to the disk while steps go on
                any of them -> Recovering -> Starting
                any of them -> Draining -> Finished
                any of them -> Failed
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class RunSteps:
    """Train ``num_steps`` steps; ``first_step`` steps were done before them."""

    first_step: int
    num_steps: int

    @property
    def step(self) -> int:
        """Steps done when this is answered."""
        return self.first_step + self.num_steps


@dataclass(frozen=True)
class Evaluate:
    """Measure held-out loss after ``step`` steps."""

    step: int


@dataclass(frozen=True)
class Save:
    """Copy the state after ``step`` steps and begin to write it."""

    step: int


Operation = RunSteps | Evaluate | Save
"""What the coordinator asks of all shards, in the same order of each."""


@dataclass(frozen=True)
class Replies:
    """How each rank has answered a call so far; a rank is in exactly one of the fields."""

    values: Mapping[int, Any] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)
    """Ranks whose process is gone or hung, and how that shows."""
    cut_off: Mapping[int, str] = field(default_factory=dict)
    """Ranks whose collective failed because a peer is gone."""
    errors: Mapping[int, Exception] = field(default_factory=dict)
    """Ranks that raised anything else."""
    waiting: tuple[int, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the call cannot succeed any more."""
        return bool(self.lost or self.cut_off or self.errors)


class Call(Protocol):
    """One method asked of several shards."""

    def poll(self, timeout_s: float) -> Replies:
        """Wait until all have answered, at most ``timeout_s``, and return what is known."""


@dataclass(frozen=True)
class Asked:
    """An operation under way."""

    operation: Operation
    call: Call


@dataclass(frozen=True)
class Flight:
    """What the shards of one generation were asked to do."""

    generation: int
    last: Operation
    """The last operation asked for, answered or not."""
    asked: tuple[Asked, ...] = ()
    """Not answered yet, oldest first."""


@dataclass(frozen=True)
class Starting:
    """Shards are launched, meet each other and load their state."""

    generation: int
    launch: tuple[int, ...]
    """Ranks that have no process yet; the others are survivors of the last generation."""


@dataclass(frozen=True)
class Running:
    """Steps are under way."""

    flight: Flight


@dataclass(frozen=True)
class Checkpointing:
    """Steps are under way while a checkpoint is being written."""

    flight: Flight
    save: Asked


@dataclass(frozen=True)
class Draining:
    """Stopping on request: finish what was asked, save, end."""

    flight: Flight
    save: Asked | None


@dataclass(frozen=True)
class Recovering:
    """Something went wrong in a generation; who is lost and what to do has to be found out."""

    generation: int
    replies: Replies


@dataclass(frozen=True)
class Finished:
    """Over, with everything up to ``step`` saved."""

    step: int
    complete: bool
    """False if the run was stopped on request before its last step."""


@dataclass(frozen=True)
class Failed:
    """Over, for a reason that trying again does not mend."""

    error: Exception


State = Starting | Running | Checkpointing | Draining | Recovering | Finished | Failed
