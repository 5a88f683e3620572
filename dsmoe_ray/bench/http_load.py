"""Requests to an OpenAI-compatible server, several at a time, as a side of a comparison. Imports no torch.

The client is the same for every server and runs beside it on the same cores, so what it costs is in every figure.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

import aiohttp

from dsmoe_ray.bench.engine_workloads import EngineWorkload
from dsmoe_ray.bench.worker_side import find_free_port
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import BenchError, BenchUnavailableError

_START_TIMEOUT_S = 300.0
_REQUEST_TIMEOUT_S = 300.0
_EXIT_TIMEOUT_S = 30.0
_POLL_S = 0.25


@dataclass
class LoadTimes:
    """When the pieces of streamed answers arrived, in seconds."""

    first_token_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    num_tokens: int = 0


class HttpSide:
    """Batches of streamed completions; each step has prompts of its own."""

    def __init__(self, url: str, model: str, workload: EngineWorkload, *, concurrency: int) -> None:
        self._url, self._model, self._workload, self._concurrency = url, model, workload, concurrency
        self.tokens_per_step = concurrency * workload.num_output_tokens
        self.times: list[LoadTimes] = []
        """Of every step so far; the seed of a step's prompts is its index."""

    def run(self, num_steps: int) -> float:
        """Send this many batches, one after another, and return the seconds until the last answer ended."""
        duration_s = 0.0
        for _ in range(num_steps):
            self.times.append(asyncio.run(self._run_batch(seed=len(self.times))))
            duration_s += self.times[-1].total_s
        return duration_s

    async def _run_batch(self, seed: int) -> LoadTimes:
        times = LoadTimes()
        prompts = self._workload.make_prompts(self._concurrency, seed=seed)
        timeout = aiohttp.ClientTimeout(total=_REQUEST_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            start_s = monotonic_s()
            await asyncio.gather(*(self._complete(session, prompt, times, start_s) for prompt in prompts))
            times.total_s = monotonic_s() - start_s
        if times.num_tokens != self.tokens_per_step:
            raise BenchError(f"{self._url} gave {times.num_tokens} tokens; asked for were {self.tokens_per_step}")
        return times

    async def _complete(
        self, session: aiohttp.ClientSession, prompt: Sequence[int], times: LoadTimes, start_s: float
    ) -> None:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": self._workload.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage, seen = None, False
        async with session.post(f"{self._url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                raise BenchError(f"{self._url} answered {answer.status}: {(await answer.text())[:200]}")
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                if not seen:
                    seen = True
                    times.first_token_s.append(monotonic_s() - start_s)
                # Only the last event has the usage, and reading every one would cost the server's cores.
                if b'"usage":{' in line or b'"usage": {' in line:
                    usage = json.loads(line[6:])["usage"]
        if usage is None:
            raise BenchError(f"{self._url} ended a stream without telling its usage")
        times.num_tokens += usage["completion_tokens"]


@contextmanager
def start_server(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, name: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server, to which ``--port`` is given, and wait until it is ready; it ends with the block.

    Args:
        command: The program and its arguments.
        environment: All of its environment; by default this process's.
        name: What messages call it.

    Yields:
        Its URL and its process.

    Raises:
        BenchUnavailableError: there is no such program.
        BenchError: it ended or did not become ready.
    """
    port = find_free_port()
    complaints: IO[bytes] = tempfile.TemporaryFile()
    try:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=complaints, stderr=complaints, env=environment
        )
    except OSError as error:
        complaints.close()
        raise BenchUnavailableError(f"{name} cannot be started: {error.strerror}") from error
    url = f"http://127.0.0.1:{port}"
    try:
        asyncio.run(_wait_until_ready(url, process, complaints, name))
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(timeout=_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        complaints.close()


def serve_command(artifact: object, *options: str) -> list[str]:
    """Return the command that serves an artifact with this very package."""
    return [sys.executable, "-m", "dsmoe_ray", "serve", str(artifact), *options]


async def _wait_until_ready(url: str, process: subprocess.Popen[bytes], complaints: IO[bytes], name: str) -> None:
    deadline_s = monotonic_s() + _START_TIMEOUT_S
    last: object = "it never answered"
    async with aiohttp.ClientSession() as session:
        while monotonic_s() < deadline_s:
            if process.poll() is not None:
                complaints.seek(0)
                lines = complaints.read().decode(errors="replace").strip().splitlines()[-3:]
                raise BenchError(f"{name} ended with code {process.returncode}: {' / '.join(lines)}")
            try:
                # A server without /ready, such as vLLM's, is ready when it is healthy.
                for path in ("/ready", "/health"):
                    async with session.get(url + path) as answer:
                        if answer.status == 200:
                            return
                        if answer.status != 404:
                            last = f"it answers {path} with {answer.status}"
                            break
            except aiohttp.ClientError as error:
                # Nobody listens yet; tried again until the time is over.
                last = error
            await asyncio.sleep(_POLL_S)
    raise BenchError(f"{name} was not ready within {_START_TIMEOUT_S:g} s: {last}")
