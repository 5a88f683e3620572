"""The two JSONL files of a run: ``metrics.jsonl`` has a row for each step done, ``events.jsonl`` tells everything else.

Rows of steps that a resume will do again are cut off first, so that each step has exactly one row. A process killed
while writing leaves at most one torn line at the end, which counts as not written.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsmoe_ray import clock
from dsmoe_ray.durable import sync_directory
from dsmoe_ray.errors import CheckpointError, TrainingError
from dsmoe_ray.training.metrics import StepMetrics


class MetricsLog:
    """Appends one row for each step, in order and without gaps."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.step = last_step(path)
        """Step of the last row; 0 if there is none."""

    def keep_until(self, step: int) -> None:
        """Cut off the rows of later steps, in one rename; call it before the first row is added.

        Raises:
            CheckpointError: the rows up to ``step`` are not all there.
        """
        if 0 < self.step < step:
            # No rows at all are right where a run starts from another run's checkpoint.
            raise CheckpointError(
                f"{self._path} ends at step {self.step}, but the checkpoint to resume from is of step {step}. "
                "Restore the file, or start over with --resume never (nothing is deleted)."
            )
        kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] <= step]
        replacement = self._path.with_name(f".{self._path.name}.new")
        with replacement.open("w", encoding="utf-8") as stream:
            stream.writelines(kept)
            stream.flush()
            os.fsync(stream.fileno())
        replacement.replace(self._path)
        sync_directory(self._path.parent)
        self.step = step

    def append(self, rows: Iterable[StepMetrics]) -> None:
        """Write rows; they are in the file, for other processes to read, when this returns."""
        lines = []
        for row in rows:
            if row.step != self.step + 1:
                raise TrainingError(
                    f"step {row.step} was reported after step {self.step}; a step is missing or doubled"
                )
            lines.append(_to_line(row.to_json()))
            self.step = row.step
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write("".join(lines))

    def sync(self) -> None:
        """Wait until the rows are on the disk: a checkpoint must not outlive the rows of its steps."""
        with self._path.open("a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())


class EventLog:
    """Appends what happens beside steps, with the time: starts, losses of shards, checkpoints, evaluations, the end."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, event: str, **fields: Any) -> None:
        """Write one event; ``fields`` are plain values."""
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(_to_line({"event": event, "time_unix_s": round(clock.unix_s(), 3), **fields}))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of either file, oldest first; a torn last line is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def last_step(path: Path) -> int:
    """Return the step of the last row, 0 if there is none."""
    rows = read_rows(path)
    return int(rows[-1]["step"]) if rows else 0


def _to_line(fields: dict[str, Any]) -> str:
    # A non-finite loss is written as null: NaN is not JSON, and readers in other languages would stop at it.
    return json.dumps({key: _finite(value) for key, value in fields.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_lines(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield line
