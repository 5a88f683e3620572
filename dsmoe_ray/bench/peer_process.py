"""Another engine as a side of a comparison, in a process of its own with an environment of its own.

The process reads one JSON line for each request and answers with one; ``tests/performance/worker_protocol.py`` is the
other end and describes the lines. While it waits for a line it uses no CPU, so our side has the machine to itself.
Imports no torch.
"""

import json
import os
import select
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

from dsmoe_ray.bench.engine_workloads import EngineWorkload
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import BenchError, BenchUnavailableError, ConfigError

_START_TIMEOUT_S = 600.0
_ANSWER_TIMEOUT_S = 600.0
_EXIT_TIMEOUT_S = 20.0
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Generation:
    """What one batch of requests took and gave."""

    prefill_s: float
    """Until every sequence had its first output token."""
    decode_s: float
    """From there until the last token of all."""
    tokens: list[list[int]]
    """Output tokens of each sequence."""

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first ones, of all sequences, a second."""
        return sum(len(own) - 1 for own in self.tokens) / self.decode_s


class PeerProcess:
    """One running worker of an engine. Use ``start_peer``, which also ends it."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = _START_TIMEOUT_S,
        answer_timeout_s: float = _ANSWER_TIMEOUT_S,
    ) -> None:
        self._answer_timeout_s = answer_timeout_s
        self._unread = b""
        self._complaints: IO[bytes] = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                bufsize=0,
                env={**os.environ, **(environment or {})},
            )
        except OSError as error:
            self._complaints.close()
            raise BenchUnavailableError(
                f"peer {command[0]!r} cannot be started: {error.strerror}; see tests/performance/README.md"
            ) from error
        try:
            self.about = self._receive(start_timeout_s)
        except BenchError:
            self.close()
            raise

    def decode(self, prompts: Sequence[Sequence[int]], num_output_tokens: int) -> Generation:
        """Generate greedily from all prompts at once.

        Raises:
            BenchError: the process died, kept silent for too long or answered with something else.
        """
        answer = self._ask({"op": "decode", "prompts": prompts, "output_tokens": num_output_tokens})
        try:
            done = Generation(float(answer["prefill_s"]), float(answer["decode_s"]), answer["tokens"])
            lengths = [len(own) for own in done.tokens]
        except (KeyError, TypeError, ValueError) as error:
            raise BenchError(f"peer answered {str(answer)[:80]}, which is no generation: {error!r}") from error
        if lengths != [num_output_tokens] * len(prompts):
            raise BenchError(
                f"peer gave {lengths} tokens; asked for were {num_output_tokens} of each of {len(prompts)}"
            )
        return done

    def compute_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the log-probabilities of every token as the next one of each prompt; raises like ``decode``."""
        answer = self._ask({"op": "logprobs", "prompts": prompts})
        if "logprobs" not in answer:
            raise BenchError(f"peer answered {str(answer)[:80]}, which has no logprobs")
        return answer["logprobs"]

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

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        line = json.dumps(request).encode() + b"\n"
        try:
            while line:
                line = line[self._process.stdin.write(line) :]
        except BrokenPipeError as error:
            raise self._death() from error
        answer = self._receive(self._answer_timeout_s)
        # A worker may learn more about itself while it works: the setting that it found fastest, say.
        self.about = {key: value for key, value in {**self.about, **answer}.items() if key not in _RESULTS}
        return answer

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        line = self._read_line(timeout_s)
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise BenchError(f"peer answered {line[:80]!r}, which is not JSON") from error
        if not isinstance(answer, dict):
            raise BenchError(f"peer answered {line[:80]!r}, which is not an object")
        return answer

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline_s = monotonic_s() + timeout_s
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._process.stdout], [], [], max(deadline_s - monotonic_s(), 0.0))
            if not readable:
                self._process.kill()
                raise BenchError(f"peer gave no answer within {timeout_s:g} s and was ended")
            piece = os.read(self._process.stdout.fileno(), _READ_BYTES)
            if not piece:
                raise self._death()
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _death(self) -> BenchError:
        code = self._process.wait()
        self._complaints.seek(0)
        last = self._complaints.read().decode(errors="replace").strip().splitlines()[-1:]
        return BenchError(f"peer ended with code {code}: {last[0] if last else 'it gave no reason'}")


_RESULTS = frozenset({"ready", "prefill_s", "decode_s", "tokens", "logprobs"})


class PeerSide:
    """One phase of a peer's generation, batch by batch, as a side of a comparison; each step has prompts of its own."""

    def __init__(
        self, peer: PeerProcess, workload: EngineWorkload, *, batch_size: int, phase: Literal["prefill", "decode"]
    ) -> None:
        self._peer, self._workload, self._batch_size, self._phase = peer, workload, batch_size, phase
        tokens_per_sequence = workload.num_prompt_tokens if phase == "prefill" else workload.num_output_tokens - 1
        self.tokens_per_step = batch_size * tokens_per_sequence
        self.generations: list[Generation] = []
        """Of every step so far; the seed of a step's prompts is its index."""

    def run(self, num_steps: int) -> float:
        """Generate this many batches and return the seconds of the phase that counts."""
        duration_s = 0.0
        for _ in range(num_steps):
            prompts = self._workload.make_prompts(self._batch_size, seed=len(self.generations))
            done = self._peer.decode(prompts, self._workload.num_output_tokens)
            self.generations.append(done)
            duration_s += done.prefill_s if self._phase == "prefill" else done.decode_s
        return duration_s


@contextmanager
def start_peer(command: Sequence[str], **settings: Any) -> Iterator[PeerProcess]:
    """Start a worker and wait until it is ready; it ends with the block. Settings are those of ``PeerProcess``.

    Raises:
        BenchUnavailableError: there is no such program.
        BenchError: it did not become ready.
    """
    peer = PeerProcess(command, **settings)
    try:
        yield peer
    finally:
        peer.close()


def parse_peer(spec: str) -> tuple[str, list[str]]:
    """Read ``NAME=COMMAND`` as a person writes it and return the name and the command's words.

    Raises:
        ConfigError: it is no such thing.
    """
    name, separator, text = spec.partition("=")
    try:
        command = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"peer {spec!r}: {error}. Write NAME=COMMAND and close every quote.") from error
    if not (name.strip() and separator and command):
        raise ConfigError(f"peer {spec!r} is not NAME=COMMAND, for example llama_cpp='python worker.py --threads 2'.")
    return name.strip(), command


def compute_agreement_ratio(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """Return the share of output tokens before the first difference of each sequence; 1 when all are the same.

    After a difference two sequences have different pasts, so what they say then proves nothing.
    """
    equal = 0
    for own, other in zip(ours, theirs, strict=True):
        differing = [index for index, (a, b) in enumerate(zip(own, other, strict=True)) if a != b]
        equal += differing[0] if differing else len(own)
    return equal / sum(map(len, ours))
