"""The gateway without HTTP: takes calls on, runs them on routers, and lets them go. Start at ``Gateway.run``.

A call is one or more prompts, each continued by a router. All their outputs meet in one mailbox: whoever writes the
answer takes everything that has come since it last looked, so that under load one write carries several tokens.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

from dsmoe_ray.errors import DsmoeError
from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.serving.admission import Admission
from dsmoe_ray.serving.config import HttpConfig
from dsmoe_ray.serving.gateway_metrics import GatewayMetrics
from dsmoe_ray.serving.openai_api.errors import FAILED, ApiError
from dsmoe_ray.serving.openai_api.requests import PlannedCall, Planner
from dsmoe_ray.serving.openai_api.responses import PromptOutput
from dsmoe_ray.serving.openai_api.served_model import ServedModel

_FIRST_POKE_S, _POKE_S = 1.0, 10.0
"""How long a reader may hear nothing."""


class GenerationPool(Protocol):
    """The routers, as the gateway sees them."""

    def generate(
        self, request_id: str, request: GenerationRequest, *, deadline_s: float | None = None
    ) -> AsyncGenerator[SequenceOutput, None]:
        """Continue a prompt; all its sequences end with a finish reason. Closing the iterator cancels the request.

        Args:
            request_id: No other request of this gateway has it, now or later.
            request: Has a seed.
            deadline_s: How long it may take; None as long as it takes.

        Raises:
            RequestError: the request cannot be served.
            EngineFullError: no router has room for it.
            DeadlineError: it took too long.
            DsmoeError: it cannot go on.
        """


class Gateway:
    """Everything behind the HTTP routes of one process."""

    def __init__(
        self,
        pool: GenerationPool,
        model: ServedModel,
        config: HttpConfig,
        *,
        max_sequences: int,
        explain_unready: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Make a gateway that is open at once.

        Args:
            pool: Routers that run the model.
            model: What is served.
            config: Limits.
            max_sequences: How many the routers run at once; see ``HttpConfig.max_sequences``.
            explain_unready: Says what is missing until every token could be computed, None if nothing is.
        """
        self.model, self.config = model, config
        self.admission = Admission(
            max_tokens=config.max_queued_tokens, max_sequences=config.max_sequences or max_sequences
        )
        self.metrics = GatewayMetrics(self.admission)
        self.planner = Planner(model, max_prompts=config.max_prompts)
        self._pool, self._explain_unready = pool, explain_unready
        self._name = secrets.token_hex(4)
        self._num_requests = 0
        self._running: set[RunningCall] = set()
        self._draining = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def follow_capacity(self, max_sequences: int) -> None:
        """Take on as many sequences as the routers now run at once, unless the configuration gives a number."""
        self.admission.set_max_sequences(self.config.max_sequences or max_sequences)

    def explain_unready(self) -> str | None:
        """Return why calls would not be answered now; None if they would."""
        return "the server is stopping" if self._draining else self._explain_unready()

    def check_open(self) -> None:
        """Refuse a call that would be refused whatever it asks for.

        Raises:
            ApiError: it has to come again later.
        """
        if self._draining:
            raise ApiError(
                "the server is stopping. Try again.", status=503, kind=FAILED, code="stopping", retry_after_s=1
            )
        self.admission.check_open()

    @asynccontextmanager
    async def run(self, call: PlannedCall, *, deadline_s: float | None = None) -> AsyncIterator["RunningCall"]:
        """Run a call while the context lasts, for at most ``deadline_s``; leaving early cancels it.

        Raises:
            ApiError: it is not taken on.
        """
        self.check_open()
        with self.admission.take(call.count_tokens(self.model), call.num_choices):
            self.metrics.prompt_tokens.inc(call.num_prompt_tokens)
            running = RunningCall()
            self._running.add(running)
            self._is_idle.clear()
            try:
                running.start([self._continue(prompt.request, deadline_s) for prompt in call.prompts], n=call.n)
                yield running
            finally:
                try:
                    await running.stop()
                finally:
                    self._running.discard(running)
                    if not self._running:
                        self._is_idle.set()

    def begin_drain(self) -> None:
        """Refuse new calls from now on; those under way go on."""
        self._draining = True

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls and return when all others have ended; after ``timeout_s`` they end with an error."""
        self.begin_drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            stopping = ApiError("the server has stopped.", status=503, kind=FAILED, code="stopping", retry_after_s=1)
            for running in self._running:
                running.abort(stopping)
            await self._is_idle.wait()

    def _continue(self, request: GenerationRequest, deadline_s: float | None) -> AsyncGenerator[SequenceOutput, None]:
        self._num_requests += 1
        return self._pool.generate(f"{self._name}-{self._num_requests}", request, deadline_s=deadline_s)


class RunningCall:
    """One call under way: a mailbox that routers fill and the writer of the answer empties."""

    def __init__(self) -> None:
        self._outputs: list[PromptOutput] = []
        self._error: Exception | None = None
        self._has_news = asyncio.Event()
        self._pumps: list[asyncio.Task[None]] = []
        self._num_pumping = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self, sources: list[AsyncGenerator[SequenceOutput, None]], *, n: int) -> None:
        """Read the outputs of each prompt's ``n`` sequences."""
        self._num_pumping = len(sources)
        self._pumps = [asyncio.create_task(self._pump(idx, source, n)) for idx, source in enumerate(sources)]
        self._timer = asyncio.get_running_loop().call_later(_FIRST_POKE_S, self._poke)

    async def next_outputs(self) -> list[PromptOutput] | None:
        """Wait for news and return all there is: now and then nothing, and None when everything was returned.

        Raises:
            Exception: why the call cannot go on; after everything that came before.
        """
        if not self._outputs and self._error is None and self._num_pumping:
            await self._has_news.wait()
        self._has_news.clear()
        outputs, self._outputs = self._outputs, []
        if outputs:
            return outputs
        if self._error is not None:
            raise self._error
        return outputs if self._num_pumping else None

    def abort(self, error: Exception) -> None:
        """End the call for a reason of its own, unless it has one already."""
        if self._error is None:
            self._error = error
        self._has_news.set()

    async def stop(self) -> None:
        """Let the routers go; returns when none has anything to do with the call any more."""
        if self._timer is not None:
            self._timer.cancel()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, prompt_idx: int, source: AsyncGenerator[SequenceOutput, None], n: int) -> None:
        num_unfinished = n
        try:
            async with aclosing(source):
                async for output in source:
                    num_unfinished -= output.finish_reason is not None
                    self._outputs.append((prompt_idx, output))
                    self._has_news.set()
            if num_unfinished:
                raise DsmoeError(f"{num_unfinished} of {n} texts have no end.")
        except Exception as error:  # noqa: BLE001 - raised by whoever writes the answer
            self.abort(error)
        finally:
            self._num_pumping -= 1
            self._has_news.set()

    def _poke(self) -> None:
        self._has_news.set()
        self._timer = asyncio.get_running_loop().call_later(_POKE_S, self._poke)
