"""A reporter that remembers what it was told."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dsmoe_ray.training.metrics import EvalMetrics, StepMetrics


@dataclass
class FakeReporter:
    """Lists of everything told."""

    said: list[str] = field(default_factory=list)
    started: list[int] = field(default_factory=list)
    rows: list[StepMetrics] = field(default_factory=list)
    evaluations: list[EvalMetrics] = field(default_factory=list)

    def say(self, message: str) -> None:
        """Remember a line."""
        self.said.append(message)

    def prepare(self, phase: str, done: int, total: int) -> None:
        """Forget it."""

    def start(self, step: int, num_steps: int) -> None:
        """Remember where training began."""
        self.started.append(step)

    def steps(self, rows: Sequence[StepMetrics]) -> None:
        """Remember rows."""
        self.rows += rows

    def evaluation(self, metrics: EvalMetrics) -> None:
        """Remember an evaluation."""
        self.evaluations.append(metrics)

    def close(self) -> None:
        """Do nothing."""
