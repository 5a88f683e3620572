"""How a run tells a person where it stands: a progress bar on a terminal, plain lines elsewhere."""

from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.text import Text

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.training.metrics import EvalMetrics, StepMetrics

LINE_EVERY_S = 5.0
_REFRESH_PER_S = 2.0
"""A faster bar would take time from shards on the same cores."""
_SMOOTHING = 0.8
_BAR_WIDTH = 12
"""Leaves room for the figures on a narrow terminal."""


class Reporter(Protocol):
    """What a run tells while it goes on."""

    def say(self, message: str) -> None:
        """Tell one thing."""

    def prepare(self, phase: str, done: int, total: int) -> None:
        """Tell how much of a phase of data preparation is done."""

    def start(self, step: int, num_steps: int) -> None:
        """Tell that ``step`` of ``num_steps`` steps are done and the rest begins; also after a recovery."""

    def steps(self, rows: Sequence[StepMetrics]) -> None:
        """Tell what steps measured."""

    def evaluation(self, metrics: EvalMetrics) -> None:
        """Tell what an evaluation measured."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Pace:
    """Tokens per second and time left, from the answers as they come in."""

    def __init__(self) -> None:
        self._last_s = monotonic_s()
        self.tokens_per_s = 0.0
        self._step_s = 0.0

    def restart(self) -> None:
        """Begin to count time now."""
        self._last_s = monotonic_s()

    def add(self, rows: Sequence[StepMetrics]) -> None:
        """Count steps that were answered now."""
        now_s = monotonic_s()
        elapsed_s = max(now_s - self._last_s, 1e-6)
        self._last_s = now_s
        self.tokens_per_s = self._smooth(self.tokens_per_s, sum(row.tokens for row in rows) / elapsed_s)
        self._step_s = self._smooth(self._step_s, elapsed_s / len(rows))

    def eta(self, num_steps: int) -> str:
        """Return the time that ``num_steps`` more steps take, as minutes and seconds."""
        left_s = int(self._step_s * num_steps)
        hours, minutes, seconds = left_s // 3600, left_s // 60 % 60, left_s % 60
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

    @staticmethod
    def _smooth(old: float, new: float) -> float:
        return new if old == 0.0 else _SMOOTHING * old + (1 - _SMOOTHING) * new


class PlainReporter:
    """Lines for logs: one every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = Pace()
        self._num_steps = 0
        self._next_line_s = 0.0
        self._phase = ""

    def say(self, message: str) -> None:
        """Print a line."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def prepare(self, phase: str, done: int, total: int) -> None:
        """Print where preparation stands."""
        if self._is_due(phase != self._phase or done >= total):
            self._phase = phase
            self.say(f"data: {phase} {done / max(total, 1):.0%}")

    def start(self, step: int, num_steps: int) -> None:
        """Print where training begins."""
        self._num_steps = num_steps
        self._pace.restart()
        self.say(f"training: step {step} of {num_steps}")

    def steps(self, rows: Sequence[StepMetrics]) -> None:
        """Print the newest step."""
        self._pace.add(rows)
        last = rows[-1]
        if self._is_due(last.step >= self._num_steps):
            self.say(f"step {last.step}/{self._num_steps}  {describe_step(last, self._pace, self._num_steps)}")

    def evaluation(self, metrics: EvalMetrics) -> None:
        """Print both losses."""
        self.say(describe_evaluation(metrics))

    def close(self) -> None:
        """Do nothing."""

    def _is_due(self, always: bool) -> bool:
        now_s = monotonic_s()
        if not always and now_s < self._next_line_s:
            return False
        self._next_line_s = now_s + LINE_EVERY_S
        return True


class RichReporter:
    """A progress bar under the lines that are told."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = Pace()
        self._num_steps = 0
        self._task: TaskID | None = None
        self._phase = ""
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=_BAR_WIDTH),
            _CountColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
            refresh_per_second=_REFRESH_PER_S,
        )
        self._progress.start()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    def prepare(self, phase: str, done: int, total: int) -> None:
        """Move the bar of this phase."""
        if phase != self._phase:
            self._phase = phase
            self._new_bar(f"data: {phase}", total=total)
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=total)

    def start(self, step: int, num_steps: int) -> None:
        """Show the bar of training."""
        self._num_steps = num_steps
        self._pace.restart()
        self._new_bar("training", total=num_steps, completed=step)

    def steps(self, rows: Sequence[StepMetrics]) -> None:
        """Move the bar to the newest step."""
        self._pace.add(rows)
        last = rows[-1]
        detail = describe_step(last, self._pace, self._num_steps)
        if self._task is not None:
            self._progress.update(self._task, completed=last.step, detail=detail)

    def evaluation(self, metrics: EvalMetrics) -> None:
        """Print both losses above the bar."""
        self.say(describe_evaluation(metrics))

    def close(self) -> None:
        """Leave the last bar as a line."""
        self._progress.stop()

    def _new_bar(self, description: str, *, total: int, completed: int = 0) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(description, total=total, completed=completed, detail="")


class _CountColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.description.startswith("data"):
            return Text(f"{task.percentage:.0f}%")
        return Text(f"{int(task.completed)}/{int(task.total or 0)}")


def build_reporter(console: Console) -> Reporter:
    """Return a bar for a terminal and lines for anything else."""
    return RichReporter(console) if console.is_terminal else PlainReporter(console)


def describe_step(row: StepMetrics, pace: Pace, num_steps: int) -> str:
    """Return loss, speed, balance and time left in one line."""
    skipped = "  (not finite: skipped)" if row.skipped else ""
    return (
        f"loss {row.loss:.3f}  {pace.tokens_per_s:,.0f} tokens/s  balance {row.balance:.2f}  "
        f"ETA {pace.eta(num_steps - row.step)}{skipped}"
    )


def describe_evaluation(metrics: EvalMetrics) -> str:
    """Return the held-out losses in one line."""
    return (
        f"step {metrics.step}: held-out loss {metrics.loss_dense:.4f} with all experts, "
        f"{metrics.loss_sparse:.4f} as deployed"
    )
