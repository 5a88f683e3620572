"""One request of a consumer and its sequences, wherever they run: what has come, what is still to come.

A sequence is known by the tokens that came. All that is left of it can be asked for again from any router, and goes on
exactly where it was: tokens, text and log probabilities come together, so that what came with a token is complete.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field

from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest


@dataclass(eq=False, slots=True)
class ReplayedSequence:
    """One of a request's continuations."""

    idx: int
    generated_ids: list[int] = field(default_factory=list)
    has_begun: bool = False
    is_finished: bool = False


@dataclass(eq=False, slots=True)
class Job:
    """Sequences that a router is asked for: all of a request at first, single ones when they go on elsewhere."""

    generation: "Generation"
    sequences: tuple[ReplayedSequence, ...]
    may_be_refused: bool = True
    """Whether its consumer may be told that every router is full: no router has taken it yet."""
    num_fruitless: int = 0
    """Routers that were lost with it since it last had a token."""
    refused_by: set[object] = field(default_factory=set)
    """Routers that have no room for it."""

    def build_request(self) -> GenerationRequest:
        """Return what a router is asked for."""
        request = self.generation.request
        if len(self.sequences) == request.n and not any(one.generated_ids for one in self.sequences):
            return request
        (sequence,) = self.sequences
        return request.continue_sequence(sequence.idx, sequence.generated_ids)

    def split(self, *, num_fruitless: int) -> "list[Job]":
        """Return what is left of it when a router has had it."""
        whole = [self.sequences] if not any(one.has_begun for one in self.sequences) else []
        parts = whole or [(one,) for one in self.sequences if not one.is_finished]
        return [Job(self.generation, part, may_be_refused=False, num_fruitless=num_fruitless) for part in parts]


class Generation:
    """A request, and the mailbox of its consumer."""

    def __init__(self, request_id: str, request: GenerationRequest, *, deadline_s: float | None) -> None:
        self.request_id, self.request, self.deadline_s = request_id, request, deadline_s
        self.sequences = tuple(ReplayedSequence(idx) for idx in range(request.n))
        self.num_unfinished = request.n
        self.num_runs = 0
        """Times that some of it was sent to a router."""
        self._outputs: deque[SequenceOutput] = deque()
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def take(self, sequence: ReplayedSequence, output: SequenceOutput) -> None:
        """Take the next output of a sequence for the consumer."""
        if output.token is not None:
            sequence.generated_ids.append(output.token.token_id)
        sequence.has_begun = True
        if output.finish_reason is not None:
            sequence.is_finished = True
            self.num_unfinished -= 1
        if output.sequence_idx != sequence.idx or output.request_id != self.request_id:
            output = SequenceOutput(
                request_id=self.request_id,
                sequence_idx=sequence.idx,
                token=output.token,
                text=output.text,
                prompt_logprobs=output.prompt_logprobs,
                finish_reason=output.finish_reason,
                stop_reason=output.stop_reason,
                error=output.error,
            )
        self._outputs.append(output)
        self._wake()

    def fail(self, error: Exception) -> None:
        """End it with an error, after everything that came before."""
        if self._error is None:
            self._error = error
        self._wake()

    async def next_outputs(self) -> list[SequenceOutput]:
        """Wait for news and return all there is; nothing when all sequences have ended.

        Raises:
            Exception: why it cannot go on.
        """
        while not self._outputs and self._error is None and self.num_unfinished:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs = list(self._outputs)
        self._outputs.clear()
        if not outputs and self.num_unfinished:
            assert self._error is not None
            raise self._error
        return outputs

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
