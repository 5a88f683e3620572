"""A side of a comparison whose ranks are processes of their own; see ``worker.py`` for the other end."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import BenchError
from dsmoe_ray.training.config import TrainingRunConfig

_EXIT_TIMEOUT_S = 20.0


class Worker:
    """One process."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._complaints: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dsmoe_ray.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(job["num_threads"])},
        )
        self.ask(job)

    def ask(self, request: dict[str, Any]) -> None:
        """Send one request."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._death() from error

    def answer(self) -> dict[str, Any]:
        """Wait for the answer to the oldest open request.

        Raises:
            BenchError: the process is dead; says what it complained of.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        return json.loads(line)

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    def _death(self) -> BenchError:
        code = self._process.wait()
        self._complaints.seek(0)
        last = self._complaints.read().strip().splitlines()[-1:]
        return BenchError(f"a bench process ended with code {code}: {last[0] if last else 'it gave no reason'}")


class WorkerSide:
    """All ranks of one side."""

    def __init__(self, workers: list[Worker], *, tokens_per_step: int) -> None:
        self._workers = workers
        self.tokens_per_step = tokens_per_step

    def run(self, num_steps: int) -> float:
        """Do this many steps on all ranks and return the seconds until the last of them answered."""
        start_s = monotonic_s()
        self._ask_all({"steps": num_steps})
        return monotonic_s() - start_s

    def measure_peak(self, num_steps: int) -> list[dict[str, int]]:
        """Return what each rank held at most during these steps, before them, and before there was a model."""
        return self._ask_all({"peak_of_steps": num_steps})

    def _ask_all(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        for worker in self._workers:
            worker.ask(request)
        return [worker.answer() for worker in self._workers]


@contextmanager
def start_side(config: TrainingRunConfig, *, device: str, num_threads: int) -> Iterator[WorkerSide]:
    """Start one process for each rank of a run, with this many threads each; they end with the block."""
    port = find_free_port()
    workers: list[Worker] = []
    try:
        for rank in range(config.parallel.world_size):
            job = {"config": config.model_dump(mode="json"), "rank": rank, "port": port, "device": device}
            workers.append(Worker({**job, "num_threads": num_threads}))
        for worker in workers:
            worker.answer()
        yield WorkerSide(workers, tokens_per_step=config.train.num_tokens_per_step)
    finally:
        for worker in workers:
            worker.close()


def find_free_port() -> int:
    """Return a port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
