"""All routers as one: continues prompts, on another router where one is lost. Start at ``RouterPool.generate``.

Each request goes to the router with the least work. When its connection ends, when the router hangs or says that it
leaves, every sequence that has not ended is asked for again elsewhere, from its prompt and the tokens that came; what
the consumer reads is what it would have read anyway (see ``replayed_generation.py``). While there is no router at all,
sequences wait for one. Imports no torch; everything here is of one event loop.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

from dsmoe_ray.errors import DeadlineError, DsmoeError, EngineFullError, RequestError
from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.serving.replayed_generation import Generation, Job
from dsmoe_ray.serving.router_link import Connect, RouterLink, RouterSession, Run
from dsmoe_ray.serving.wire.generation_codec import GenerationMessage
from dsmoe_ray.serving.wire.messages import (
    CancelMessage,
    GenerateMessage,
    OutputsMessage,
    RejectedMessage,
    RouterStatusMessage,
)

_RETRY_S = 0.05
"""Pause before routers that were full are asked again for sequences that have begun."""
_MAX_FRUITLESS = 8
"""Routers that may be lost one after the other without a token of a sequence, before it is taken for the reason."""
_MAX_FAILED = 2
"""As before, for routers whose steps failed."""
_MOST_TOKENS = 1 << 20

_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PoolStatistics:
    """Totals since the start."""

    num_lost_routers: int = 0
    num_moved_sequences: int = 0
    """Asked for again elsewhere."""


class RouterPool:
    """The routers of one gateway. To be made and used on its event loop."""

    def __init__(self, connect: Connect, *, hung_after_s: float = 3.0, stuck_after_s: float = 10.0) -> None:
        """Make a pool without routers.

        Args:
            connect: Opens a connection to an address; called on threads of the pool.
            hung_after_s: A router that has said nothing for so long is taken for hung.
            stuck_after_s: A router whose step takes so long gets nothing more, and what it has goes to others.
        """
        self.statistics = PoolStatistics()
        self._connect, self._hung_after_s, self._stuck_after_s = connect, hung_after_s, stuck_after_s
        self._links: dict[str, RouterLink] = {}
        self._sessions: list[RouterSession] = []
        """Connections that are there."""
        self._waiting: dict[Job, None] = {}
        """Jobs without a router, in order."""
        self._retry: asyncio.TimerHandle | None = None
        self._is_closed = False

    def update_routers(self, addresses: Iterable[str]) -> None:
        """Use these routers from now on; sequences of others go on with them."""
        wanted = dict.fromkeys(addresses)
        for address in [address for address in self._links if address not in wanted]:
            self._links.pop(address).close()
        loop = asyncio.get_running_loop()
        for address in wanted:
            if address not in self._links:
                self._links[address] = RouterLink(
                    address, self._connect, self, loop=loop, hung_after_s=self._hung_after_s
                )

    @property
    def lost_addresses(self) -> frozenset[str]:
        """Return the routers that cannot be reached."""
        return frozenset(address for address, link in self._links.items() if link.is_lost)

    @property
    def num_connected(self) -> int:
        """Return how many routers would take a request."""
        return len(self._find_open())

    async def generate(
        self, request_id: str, request: GenerationRequest, *, deadline_s: float | None = None
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Continue a prompt; yield what each token adds to each sequence. Closing the generator cancels the request.

        Args:
            request_id: No other request of this pool has it, now or later.
            request: Has its seed, as every request.
            deadline_s: How long it may take; None as long as it takes.

        Raises:
            RequestError: the model or the routers cannot serve it.
            EngineFullError: no router has room for it.
            DeadlineError: it took too long.
            DsmoeError: it cannot go on.
        """
        if self._is_closed:
            raise _stopped()
        loop = asyncio.get_running_loop()
        generation = Generation(
            request_id, request, deadline_s=None if deadline_s is None else loop.time() + deadline_s
        )
        timer = None if deadline_s is None else loop.call_later(deadline_s, self._expire, generation, deadline_s)
        try:
            self._place(Job(generation, generation.sequences))
            while outputs := await generation.next_outputs():
                for output in outputs:
                    yield output
        finally:
            if timer is not None:
                timer.cancel()
            self._let_go(generation)

    def close(self) -> None:
        """Let all routers go; what is under way fails."""
        self._is_closed = True
        for link in self._links.values():
            link.close()
        self._links.clear()
        if self._retry is not None:
            self._retry.cancel()
        runs = [run for session in self._sessions for run in session.runs.values()]
        for job in [*(run.job for run in runs), *self._waiting]:
            job.generation.fail(_stopped())

    # What links tell.

    def take_connected(self, session: RouterSession) -> None:
        """Use a new connection; see ``LinkListener``."""
        self._sessions.append(session)
        self._place_waiting()
        for other in self._sessions:
            self._move_if_closed(other)

    def take_message(self, session: RouterSession, message: GenerationMessage) -> None:
        """Take what a router says; see ``LinkListener``."""
        if session.is_lost:
            return
        if isinstance(message, OutputsMessage):
            for output in message.outputs:
                self._take_output(session, output)
        elif isinstance(message, RejectedMessage):
            self._take_rejected(session, message)
        elif isinstance(message, RouterStatusMessage):
            self._take_status(session, message)
        else:
            _logger.warning("router %s sent %s and is cut off", session.address, type(message).__name__)
            session.cut()

    def take_lost(self, session: RouterSession, reason: str, *, is_hung: bool) -> None:
        """Continue elsewhere what a lost router had; see ``LinkListener``."""
        session.is_lost = True
        self._sessions.remove(session)
        self.statistics.num_lost_routers += session.address in self._links
        for run in list(session.runs.values()):
            session.remove(run)
            # A request may bring a router down; one that hangs has more likely a busy machine.
            most_fruitless = None if is_hung else _MAX_FRUITLESS
            self._continue(run, f"router {session.address} is lost: {reason}", most_fruitless=most_fruitless)

    def _take_status(self, session: RouterSession, status: RouterStatusMessage) -> None:
        was_open = self._is_open(session)
        session.take_status(status)
        if not was_open and self._is_open(session):
            self._place_waiting()
        self._move_if_closed(session)

    def _take_output(self, session: RouterSession, output: SequenceOutput) -> None:
        run = session.runs.get(str(output.request_id))
        if run is None:
            # It was cancelled while the frame was under way.
            return
        sequences, idx = run.job.sequences, output.sequence_idx
        if idx >= len(sequences) or sequences[idx].is_finished:
            _logger.warning("router %s sent more than was asked for and is cut off", session.address)
            session.cut()
            return
        session.note_output(run)
        run.job.generation.take(sequences[idx], output)
        if sequences[idx].is_finished and all(sequence.is_finished for sequence in sequences):
            session.remove(run)

    def _take_rejected(self, session: RouterSession, rejected: RejectedMessage) -> None:
        run = session.runs.get(rejected.request_id)
        if run is None:
            return
        session.remove(run)
        generation = run.job.generation
        match rejected.reason:
            case "invalid":
                generation.fail(RequestError(rejected.message, param=rejected.param or "request"))
            case "expired":
                generation.fail(DeadlineError(rejected.message))
            case "failed":
                self._continue(run, rejected.message, most_fruitless=_MAX_FAILED)
            case "full":
                run.job.refused_by.add(session)
                self._place(run.job)
            case "leaving":
                session.is_leaving = True
                self._place(run.job)

    # Jobs and runs.

    def _is_open(self, session: RouterSession) -> bool:
        """Return whether a router gets anything."""
        return not session.is_leaving and session.status.step_age_ms < 1000 * self._stuck_after_s

    def _find_open(self) -> list[RouterSession]:
        return [session for session in self._sessions if self._is_open(session)]

    def _place(self, job: Job) -> None:
        """Give a job to the router with the least work, or let it wait for one."""
        found = self._find_open()
        willing = [session for session in found if session not in job.refused_by]
        if willing:
            self._send(job, min(willing, key=lambda session: session.num_tokens))
        elif found and job.may_be_refused:
            job.generation.fail(EngineFullError("every router is full. Try again later."))
        else:
            self._waiting[job] = None
            if found and self._retry is None:
                self._retry = asyncio.get_running_loop().call_later(_RETRY_S, self._retry_waiting)

    def _place_waiting(self) -> None:
        jobs = list(self._waiting)
        self._waiting.clear()
        for job in jobs:
            self._place(job)

    def _retry_waiting(self) -> None:
        """Ask routers again that had no room."""
        self._retry = None
        for job in self._waiting:
            job.refused_by.clear()
        self._place_waiting()

    def _send(self, job: Job, session: RouterSession) -> None:
        generation, request = job.generation, job.build_request()
        generation.num_runs += 1
        number = generation.num_runs
        wire_id = generation.request_id if number == 1 else f"{generation.request_id}+{number}"
        num_known = len(request.prompt_ids) + len(request.generated_ids)
        num_wanted = request.n * min(request.max_tokens - len(request.generated_ids), _MOST_TOKENS)
        session.add(Run(wire_id, job, session, num_known + num_wanted, num_known))
        deadline_ms = None
        if generation.deadline_s is not None:
            deadline_ms = max(0, int(1000 * (generation.deadline_s - asyncio.get_running_loop().time())))
        session.send(GenerateMessage(request_id=wire_id, request=request, deadline_ms=deadline_ms))

    def _move_if_closed(self, session: RouterSession) -> None:
        """Take everything elsewhere from a router that leaves or is stuck, if there is another one."""
        if not session.runs or self._is_open(session) or not self._find_open():
            return
        runs = list(session.runs.values())
        session.send(CancelMessage(request_ids=tuple(session.runs)))
        for run in runs:
            session.remove(run)
            self._continue(run, "", most_fruitless=None)

    def _continue(self, run: Run, why: str, *, most_fruitless: int | None) -> None:
        """Ask for the rest of a run again; ``most_fruitless`` is None if its router is not to blame."""
        generation = run.job.generation
        num_fruitless = 0 if run.has_begun else run.job.num_fruitless + (most_fruitless is not None)
        if most_fruitless is not None and num_fruitless > most_fruitless:
            generation.fail(DsmoeError(f"given up after {num_fruitless} attempts without a token; the last: {why}"))
            return
        for job in run.job.split(num_fruitless=num_fruitless):
            self.statistics.num_moved_sequences += len(job.sequences)
            # Others first.
            job.refused_by.add(run.session)
            self._place(job)

    def _expire(self, generation: Generation, deadline_s: float) -> None:
        generation.fail(DeadlineError(f"the request did not end within its deadline of {deadline_s:g} s."))

    def _let_go(self, generation: Generation) -> None:
        """Forget a generation, and cancel what is left of it."""
        if not generation.num_unfinished:
            return
        for job in [job for job in self._waiting if job.generation is generation]:
            del self._waiting[job]
        for session in self._sessions:
            runs = [run for run in session.runs.values() if run.job.generation is generation]
            for run in runs:
                session.remove(run)
            if runs:
                session.send(CancelMessage(request_ids=tuple(run.wire_id for run in runs)))


def _stopped() -> DsmoeError:
    return DsmoeError("the gateway has stopped.")
