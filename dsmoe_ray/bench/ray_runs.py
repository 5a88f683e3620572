"""What driving a run through Ray costs: the coordinator against the bare step loop, start, and recovery.

Runs the coordinator as ``dsmoe train`` does, on a local Ray that is up before the clock starts, and watches it through
the reporter's calls. The text is a part of Python's standard library, prepared once.
"""

import os
import signal
import statistics
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dsmoe_ray.bench.measure import Measurement, Spread, compute_speed_ratios, describe_speed
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.worker_side import start_side
from dsmoe_ray.bench.workloads import WORKLOADS, build_run
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import BenchError, BenchUnavailableError
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.metrics import EvalMetrics, StepMetrics
from dsmoe_ray.training.metrics_log import read_rows
from dsmoe_ray.training.ray_session import ray_session
from dsmoe_ray.training.resume import ResumePlan
from dsmoe_ray.training.run import run_in_session
from dsmoe_ray.training.run_directory import open_run_directory
from dsmoe_ray.training.stop_request import StopRequest

_NUM_SHARDS = 2
_WORKLOAD = "quickstart"
_TEXT = ("asyncio", "email", "json", "unittest")


@dataclass
class Watch:
    """A reporter that notes when what happened."""

    answers: list[tuple[float, int]] = field(default_factory=list)
    """When an answer came, and the last step it covered."""
    starts_s: list[float] = field(default_factory=list)
    first_steps_s: list[float] = field(default_factory=list)
    """When the first step after each start was answered."""
    kill_after: int | None = None
    """Kill a shard once this step is done."""
    events: Path | None = None
    killed_at_s: float | None = None

    def say(self, message: str) -> None:
        """Ignore it."""

    def prepare(self, phase: str, done: int, total: int) -> None:
        """Ignore it."""

    def evaluation(self, metrics: EvalMetrics) -> None:
        """Ignore it."""

    def close(self) -> None:
        """Nothing to close."""

    def start(self, step: int, num_steps: int) -> None:
        """Note that training begins, or begins again."""
        self.starts_s.append(monotonic_s())

    def steps(self, rows: Sequence[StepMetrics]) -> None:
        """Note the time of an answer; kill a shard when it is time."""
        now_s = monotonic_s()
        self.answers.append((now_s, rows[-1].step))
        if len(self.first_steps_s) < len(self.starts_s):
            self.first_steps_s.append(now_s)
        if self.kill_after is not None and rows[-1].step >= self.kill_after and self.events is not None:
            self.kill_after = None
            shards = [event for event in read_rows(self.events) if event["event"] == "shards"]
            os.kill(shards[-1]["process_ids"][-1], signal.SIGKILL)
            self.killed_at_s = monotonic_s()

    def duration_of(self, num_steps: int) -> float:
        """Return the time of about the last ``num_steps`` steps, scaled to exactly as many."""
        end_s, last = self.answers[-1]
        begin_s, first = min(self.answers, key=lambda answer: abs(answer[1] - (last - num_steps)))
        return (end_s - begin_s) / (last - first) * num_steps


def compare_with_bare_loop(settings: Settings) -> Measurement:
    """Return tokens/s through the coordinator over those of two ranks that only step; turn by turn."""
    num_warmup, num_steps = (5, 10) if settings.quick else (10, 40)
    num_pairs = 1 if settings.quick else max(3, settings.num_pairs // 2)
    config = _build_config(settings, steps=num_warmup + num_steps, save_every=num_steps // 2)
    ours_s, bare_s = [], []
    with _prepared_session(config) as root, start_side(config, device="cpu", num_threads=1) as bare:
        bare.run(2)
        for pair in range(num_pairs):
            ours_s.append(_train(config, root / f"pair-{pair}", Watch()).duration_of(num_steps))
            bare_s.append(bare.run(num_steps))
    tokens = config.train.num_tokens_per_step * num_steps
    return Measurement(
        figure=Spread.of(compute_speed_ratios(ours_s, bare_s, 1.0)),
        ours=describe_speed(ours_s, tokens),
        baseline=describe_speed(bare_s, tokens),
        details={"steps_per_turn": num_steps, "checkpoints_per_turn": 2},
    )


def measure_start(settings: Settings) -> Measurement:
    """Return the seconds from asking for a run, with Ray up and the data prepared, to its first step done."""
    config = _build_config(settings, steps=2, save_every=None)
    durations_s = []
    with _prepared_session(config) as root:
        for repeat in range(1 if settings.quick else 3):
            watch = Watch()
            asked_s = monotonic_s()
            _train(config, root / f"start-{repeat}", watch)
            durations_s.append(watch.first_steps_s[0] - asked_s)
    return Measurement(figure=Spread.of(durations_s), ours={"start_s": durations_s})


def measure_recovery(settings: Settings) -> Measurement:
    """Return the seconds from killing a shard to the next step done; the survivor keeps its process."""
    config = _build_config(settings, steps=16, save_every=4)
    durations_s, kept = [], []
    with _prepared_session(config) as root:
        for repeat in range(1 if settings.quick else 3):
            directory = root / f"recovery-{repeat}"
            watch = _train(config, directory, Watch(kill_after=6, events=directory / "events.jsonl"))
            if watch.killed_at_s is None or len(watch.first_steps_s) < 2:
                raise BenchError(f"the run in {directory} did not go on after its shard was killed")
            durations_s.append(watch.first_steps_s[1] - watch.killed_at_s)
            before, after = [e["process_ids"] for e in read_rows(directory / "events.jsonl") if e["event"] == "shards"]
            kept.append(before[0] == after[0] and before[1] != after[1])
    return Measurement(
        figure=Spread.of(durations_s),
        ours={"recovery_s": durations_s, "median_s": statistics.median(durations_s)},
        details={"survivors_kept_their_processes": all(kept)},
    )


def _build_config(settings: Settings, *, steps: int, save_every: int | None) -> TrainingRunConfig:
    if settings.device != "cpu":
        raise BenchUnavailableError("runs through Ray are measured on CPUs with two shards; use --device cpu")
    library = Path(sysconfig.get_path("stdlib"))
    sections = {
        "data.paths": [str(library / name) for name in _TEXT],
        "data.include": "*.py",
        "train.steps": steps,
        "checkpoint.every_steps": save_every,
    }
    return build_run(WORKLOADS[_WORKLOAD], ep=_NUM_SHARDS, num_threads=1, sections=sections)


@contextmanager
def _prepared_session(config: TrainingRunConfig) -> Iterator[Path]:
    """Give a directory with prepared data, and a Ray that is up and has run before."""
    with tempfile.TemporaryDirectory(prefix="dsmoe-bench-") as root, ray_session(config.parallel, address=None):
        short = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1})})
        _train(short, Path(root) / "warmup", Watch())
        yield Path(root)


def _train(config: TrainingRunConfig, directory: Path, watch: Watch) -> Watch:
    """Run to the end in a fresh directory and return the watch."""
    run = config.run.model_copy(update={"dir": str(directory)})
    data = config.data.model_copy(update={"prepared_dir": str(directory.parent / "data")})
    config = config.model_copy(update={"run": run, "data": data})
    opened = open_run_directory(config)
    with opened.lock():
        run_in_session(config, opened, ResumePlan(None, 0), reporter=watch, stop=StopRequest())
    return watch
