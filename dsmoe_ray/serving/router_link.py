"""One router as a gateway sees it: a connection that is made again whenever it is lost.

A thread connects and reads, another writes; everything that they find out is told on the event loop of the gateway, one
call for each frame. A router that says nothing for a while is taken for hung, and its connection is cut.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from dsmoe_ray.errors import ConnectionLostError, DsmoeError, FrameError, RequestError
from dsmoe_ray.serving.replayed_generation import Job
from dsmoe_ray.serving.wire.connection import Connection
from dsmoe_ray.serving.wire.generation_codec import GenerationMessage, from_frame, to_frame
from dsmoe_ray.serving.wire.messages import CancelMessage, GenerateMessage, RejectedMessage, RouterStatusMessage

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.02, 1.0
"""Between two attempts to connect."""

_GRACE_S = 0.25

_logger = logging.getLogger(__name__)

Connect = Callable[[str], Connection]
"""Opens a connection to a router at an address; see ``wire/transport.py``."""


class LinkListener(Protocol):
    """What a link tells, always on the event loop."""

    def take_connected(self, session: "RouterSession") -> None:
        """There is a connection."""

    def take_message(self, session: "RouterSession", message: GenerationMessage) -> None:
        """The router says something."""

    def take_lost(self, session: "RouterSession", reason: str, *, is_hung: bool) -> None:
        """The connection is gone, or the router says nothing any more; the session is over."""


@dataclass(eq=False, slots=True)
class Run:
    """A job on a router."""

    wire_id: str
    """Of the request that the router knows."""
    job: Job
    session: "RouterSession"
    num_tokens: int
    """Outstanding: of the prompt, and wanted."""
    num_prompt_tokens: int
    has_begun: bool = False


class RouterSession:
    """One connection to a router while it lasts."""

    def __init__(self, address: str, connection: Connection) -> None:
        self.address = address
        self.connection = connection
        self.status = RouterStatusMessage(num_running=0, num_waiting=0, num_free_tokens=0)
        """The newest."""
        self.is_leaving = False
        self.is_lost = False
        self.runs: dict[str, Run] = {}
        """By their ids on the wire: what the router has been asked for and has not ended."""
        self.num_own_tokens = 0
        """Outstanding tokens of ``runs``."""
        self.num_others_tokens = 0
        """Outstanding tokens of other gateways, when the status came."""
        self.outbox: queue.SimpleQueue[GenerateMessage | CancelMessage | None] = queue.SimpleQueue()

    @property
    def num_tokens(self) -> int:
        """Return how much work the router has, as far as is known here."""
        return self.num_own_tokens + self.num_others_tokens

    def add(self, run: Run) -> None:
        """Note that the router is asked for something."""
        self.runs[run.wire_id] = run
        self.num_own_tokens += run.num_tokens

    def remove(self, run: Run) -> None:
        """Note that a run is over."""
        del self.runs[run.wire_id]
        self.num_own_tokens -= run.num_tokens

    def note_output(self, run: Run) -> None:
        """Note that a run has come a token further."""
        num_done = 1 if run.has_begun else 1 + run.num_prompt_tokens
        run.has_begun = True
        num_done = min(num_done, run.num_tokens)
        run.num_tokens -= num_done
        self.num_own_tokens -= num_done

    def send(self, message: GenerateMessage | CancelMessage) -> None:
        """Send a message soon; never waits."""
        self.outbox.put(message)

    def cut(self) -> None:
        """End a connection that is no good; its link makes another one."""
        self.connection.close()

    def take_status(self, status: RouterStatusMessage) -> None:
        """Note how busy the router is."""
        self.status = status
        self.is_leaving = self.is_leaving or status.leaving
        self.num_others_tokens = max(0, status.num_outstanding_tokens - self.num_own_tokens)


class RouterLink:
    """Keeps a connection to one router."""

    def __init__(
        self,
        address: str,
        connect: Connect,
        listener: LinkListener,
        *,
        loop: asyncio.AbstractEventLoop,
        hung_after_s: float,
    ) -> None:
        """Begin to connect."""
        self.address = address
        self.is_lost = False
        """Whether the last attempt to connect failed."""
        self._connect, self._listener, self._loop = connect, listener, loop
        self._hung_after_s = hung_after_s
        self._session: RouterSession | None = None
        self._is_closed = threading.Event()
        threading.Thread(target=self._run, name=f"from {address}", daemon=True).start()

    def close(self) -> None:
        """Let the router go; from any thread."""
        self._is_closed.set()
        session = self._session
        if session is not None:
            session.connection.close()

    def _run(self) -> None:
        pause_s = _MIN_PAUSE_S
        while not self._is_closed.is_set():
            try:
                connection = self._connect(self.address)
            except (DsmoeError, OSError) as error:
                if not self.is_lost:
                    _logger.warning("router %s cannot be reached, trying on: %s", self.address, error)
                self.is_lost = True
                self._is_closed.wait(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
                continue
            pause_s = _MIN_PAUSE_S
            self.is_lost = False
            self._serve(connection)

    def _serve(self, connection: Connection) -> None:
        session = self._session = RouterSession(self.address, connection)
        if self._is_closed.is_set():
            connection.close()
        threading.Thread(target=self._write, args=(session,), name=f"to {self.address}", daemon=True).start()
        self._tell(self._listener.take_connected, session)
        is_hung = False
        try:
            self._read(session)
            is_hung, reason = True, f"it has said nothing for {self._hung_after_s:g} s"
        except (ConnectionLostError, FrameError) as error:
            reason = str(error)
        connection.close()
        session.outbox.put(None)
        if not self._is_closed.is_set():
            _logger.warning("router %s is lost: %s", self.address, reason)
        self._tell(partial(self._listener.take_lost, session, reason, is_hung=is_hung))

    def _read(self, session: RouterSession) -> None:
        """Read until the router hangs."""
        receive, take_message = session.connection.receive, self._listener.take_message
        while True:
            frame = receive(self._hung_after_s)
            if frame is None:
                # It may be this process that stood still, and has not looked since.
                frame = receive(_GRACE_S)
            if frame is None:
                return
            self._tell(take_message, session, from_frame(frame))

    def _write(self, session: RouterSession) -> None:
        while (message := session.outbox.get()) is not None:
            try:
                session.connection.send(to_frame(message))
            except (RequestError, FrameError) as error:
                if isinstance(message, GenerateMessage):
                    param = error.param if isinstance(error, RequestError) else "prompt_ids"
                    rejected = RejectedMessage(
                        request_id=message.request_id, reason="invalid", message=str(error), param=param
                    )
                    self._tell(self._listener.take_message, session, rejected)
            except ConnectionLostError:
                # The reading thread finds out too, and tells.
                return

    def _tell(self, call: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            # The loop is closed: nobody wants to know any more.
            self.close()
