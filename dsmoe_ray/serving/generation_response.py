"""The answer to a call that generates, whole or as a stream of events, from its first token to its last.

Three things may end it early: its deadline, a client that leaves, and an error. Until the first event is sent an error
is an answer with a status; after that it is an event, and the stream ends without ``[DONE]``.
"""

import asyncio
import logging
from collections.abc import Callable

from fastapi import Response
from starlette.types import Receive, Scope, Send

from dsmoe_ray.clock import monotonic_s, unix_s
from dsmoe_ray.errors import DeadlineError
from dsmoe_ray.serving.gateway import Gateway, RunningCall
from dsmoe_ray.serving.http_edge import ABORT_EXTENSION, ClientGoneError, JsonResponse
from dsmoe_ray.serving.openai_api.errors import ApiError, to_api_error
from dsmoe_ray.serving.openai_api.requests import PlannedCall
from dsmoe_ray.serving.openai_api.responses import KEEP_ALIVE, AnswerWriter, PromptOutput, write_error_event

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_STALLED_S = 2.0
"""How long a client that does not read may hold a call beyond its deadline."""

logger = logging.getLogger(__name__)


class GenerationResponse(Response):
    """Runs a call and sends its answer while it comes."""

    def __init__(self, gateway: Gateway, call: PlannedCall, *, arrived_s: float, timeout_s: float) -> None:
        """Prepare an answer.

        Args:
            gateway: Runs the call.
            call: What is asked for.
            arrived_s: When, on the monotonic clock.
            timeout_s: How long it may take from then on.
        """
        self.background = None
        self.status_code = 200
        self._gateway, self._call = gateway, call
        self._arrived_s, self._timeout_s = arrived_s, timeout_s
        self._writer = AnswerWriter(call, gateway.model, created_s=int(unix_s()))
        self._is_first = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the call and answer it."""
        loop = asyncio.get_running_loop()
        left_s = self._timeout_s - (monotonic_s() - self._arrived_s)
        async with self._gateway.run(self._call, deadline_s=max(left_s, 0.001)) as running:
            watcher = asyncio.create_task(_watch(receive, running))
            # Once more beside the routers' own, who may hang.
            alarm = loop.call_later(left_s, running.abort, self._late())
            try:
                async with asyncio.timeout(left_s + _STALLED_S) as limit:
                    await (self._stream if self._call.stream else self._collect)(running, scope, receive, send)
            except TimeoutError:
                if not limit.expired():
                    raise
                logger.warning("request %s: its client does not read; cut off", self._call.request_id)
                await _cut(scope)
                raise ClientGoneError from None
            finally:
                alarm.cancel()
                watcher.cancel()
                self._gateway.metrics.generated_tokens.inc(self._writer.num_generated_tokens)
                self._gateway.metrics.duration.observe(monotonic_s() - self._arrived_s)

    async def _collect(self, running: RunningCall, scope: Scope, receive: Receive, send: Send) -> None:
        while (outputs := await running.next_outputs()) is not None:
            self._note_first(outputs)
            self._writer.take(outputs)
        write = self._writer.write_whole
        is_long = self._call.logprobs is not None
        await JsonResponse(await asyncio.to_thread(write) if is_long else write())(scope, receive, send)

    async def _stream(self, running: RunningCall, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        try:
            while (outputs := await running.next_outputs()) is not None:
                self._note_first(outputs)
                events = self._writer.write_events(outputs) if outputs else KEEP_ALIVE
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                if events:
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            last = self._writer.write_end()
        except ClientGoneError:
            raise
        except Exception as error:
            if not started:
                raise
            last = write_error_event(self._tell(error))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _tell(self, error: Exception) -> ApiError:
        answer = to_api_error(error)
        self._gateway.metrics.failed_streams.inc()
        trace = error if answer.status == 500 else None
        logger.warning("request %s: its stream failed: %s", self._call.request_id, answer, exc_info=trace)
        return answer

    def _note_first(self, outputs: list[PromptOutput]) -> None:
        if self._is_first and outputs:
            self._is_first = False
            self._gateway.metrics.time_to_first_token.observe(monotonic_s() - self._arrived_s)

    def _late(self) -> DeadlineError:
        return DeadlineError(
            f"the call did not end within its {self._timeout_s:g} s. Allow more time, or ask for fewer tokens."
        )


async def _watch(receive: Receive, running: RunningCall) -> None:
    """End the call when its client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    running.abort(ClientGoneError())


async def _cut(scope: Scope) -> None:
    abort: Callable[[], None] | None = scope.get("extensions", {}).get(ABORT_EXTENSION)
    if abort is not None:
        abort()
        # Until the connection knows that it is lost.
        await asyncio.sleep(0)
