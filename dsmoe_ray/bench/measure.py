"""Compare two sides fairly: they take turns in one run, and what counts is the median of the ratios of neighbours.

A machine's speed drifts with its clock and its other users. A ratio of two turns that follow each other hardly sees
that, and a median of several such ratios is not moved by one disturbed turn. Imports no torch.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol


class Side(Protocol):
    """One of two things that are compared; both stay alive and idle while the other has its turn."""

    tokens_per_step: int

    def run(self, num_steps: int) -> float:
        """Do this many steps and return the seconds they took."""


@dataclass(frozen=True)
class Spread:
    """A median of repeated measurements and how far they lay apart."""

    median: float
    min: float
    max: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarise measurements; there must be at least one."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def scaled(self, factor: float) -> "Spread":
        """Return the spread of the measurements times a positive number."""
        return Spread(self.median * factor, self.min * factor, self.max * factor, self.count)


@dataclass(frozen=True)
class Bar:
    """What a figure is held against; missing it is told, and is not an error."""

    kind: Literal["at_least", "at_most"]
    value: float

    def is_met_by(self, figure: float) -> bool:
        """Say whether a figure is on the right side."""
        return figure >= self.value if self.kind == "at_least" else figure <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.kind == 'at_least' else '<='} {self.value:g}"


@dataclass(frozen=True)
class Measurement:
    """What one comparison found."""

    figure: Spread
    """What is held against the bar."""
    ours: dict[str, Any] = field(default_factory=dict)
    """Absolute figures of our side."""
    baseline: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a report: what was measured and the bar it is held against, or why there is nothing."""

    name: str
    what: str
    unit: str
    bar: Bar | None
    status: Literal["measured", "skipped", "failed"] = "measured"
    reason: str | None = None
    """Why nothing was measured."""
    measurement: Measurement | None = None
    duration_s: float = 0.0
    """How long the whole comparison took, warm-up included."""
    load_average: float | None = None
    """Processes that wanted a core during the minute before; above the number of threads, others were busy too."""

    @property
    def passed(self) -> bool | None:
        """Whether the bar is met; None without a figure or a bar."""
        if self.measurement is None or self.bar is None:
            return None
        return self.bar.is_met_by(self.measurement.figure.median)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        found = self.measurement
        return {
            "name": self.name,
            "what": self.what,
            "status": self.status,
            "reason": self.reason,
            "unit": self.unit,
            "figure": None if found is None else asdict(found.figure),
            "bar": None if self.bar is None else {self.bar.kind: self.bar.value},
            "passed": self.passed,
            "ours": {} if found is None else found.ours,
            "baseline": {} if found is None else found.baseline,
            "details": {} if found is None else found.details,
            "duration_s": round(self.duration_s, 1),
            "load_average": self.load_average,
        }


@dataclass(frozen=True)
class Turns:
    """How often two sides take turns."""

    num_pairs: int
    steps_per_turn: int = 1
    warmup_steps: int = 2


def compare_speed(ours: Side, baseline: Side, turns: Turns) -> Measurement:
    """Let two sides take turns, ours first, after each has warmed up; the figure is our tokens/s over theirs."""
    for side in (ours, baseline):
        if turns.warmup_steps:
            side.run(turns.warmup_steps)
    ours_s, baseline_s = [], []
    for _ in range(turns.num_pairs):
        ours_s.append(ours.run(turns.steps_per_turn))
        baseline_s.append(baseline.run(turns.steps_per_turn))
    ours_tokens = ours.tokens_per_step * turns.steps_per_turn
    baseline_tokens = baseline.tokens_per_step * turns.steps_per_turn
    return Measurement(
        figure=Spread.of(compute_speed_ratios(ours_s, baseline_s, ours_tokens / baseline_tokens)),
        ours=describe_speed(ours_s, ours_tokens),
        baseline=describe_speed(baseline_s, baseline_tokens),
    )


def compute_speed_ratios(ours_s: Sequence[float], baseline_s: Sequence[float], tokens_ratio: float) -> list[float]:
    """Return our tokens per second over the baseline's, one for each pair of neighbouring turns.

    Args:
        ours_s: Duration of each of our turns.
        baseline_s: Duration of the turn after it.
        tokens_ratio: Tokens of one of our turns over those of one of the baseline's.
    """
    return [tokens_ratio * theirs_s / mine_s for mine_s, theirs_s in zip(ours_s, baseline_s, strict=True)]


def describe_speed(durations_s: Sequence[float], tokens_per_turn: int) -> dict[str, Any]:
    """Return one side's tokens per second, of its median turn and of its fastest."""
    return {
        "tokens_per_s": tokens_per_turn / statistics.median(durations_s),
        "best_tokens_per_s": tokens_per_turn / min(durations_s),
        "tokens_per_turn": tokens_per_turn,
    }
