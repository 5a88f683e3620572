"""What every listener does with an accepted connection: handshake, handler, close; one log line for each failure."""

import itertools
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from dsmoe_ray.errors import ConnectionLostError, FrameError
from dsmoe_ray.serving.wire.connection import Connection, HandleConnection
from dsmoe_ray.serving.wire.handshake import HANDSHAKE_TIMEOUT_S, Hello, UnprovenConnection, prove_to_caller

MAX_CONNECTIONS = 1024
"""More are closed as they come: each costs a thread."""
MAX_UNPROVEN_CONNECTIONS = 64
"""Of those, how many may be in their handshake."""

_logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Acceptance:
    """One listener's connections, each from its handshake to its end."""

    handle: HandleConnection
    hello: Hello
    secret: bytes = field(repr=False)
    max_frame_bytes: int
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    _open: set[Connection] = field(default_factory=set)
    _unproven: set[Connection] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def name_caller(self, address: str) -> str:
        """Return what the log calls the next connection."""
        return f"caller {next(self._numbers)} of {address}"

    def start(self, connection: UnprovenConnection, *, caller: str) -> None:
        """Run a connection until its end, on a thread of its own."""
        threading.Thread(target=self._run, args=(connection, caller), name=caller, daemon=True).start()

    def close(self) -> None:
        """Close every connection, and let none in any more."""
        with self._lock:
            self._closed = True
            connections = list(self._open)
        for connection in connections:
            connection.close()

    def _run(self, connection: UnprovenConnection, caller: str) -> None:
        try:
            if self._admit(connection, caller) and self._greet(connection, caller):
                self._run_handler(connection, caller)
        finally:
            connection.close()
            with self._lock:
                self._open.discard(connection)
                self._unproven.discard(connection)

    def _admit(self, connection: Connection, caller: str) -> bool:
        with self._lock:
            if self._closed:
                return False
            if len(self._open) < MAX_CONNECTIONS and len(self._unproven) < MAX_UNPROVEN_CONNECTIONS:
                self._open.add(connection)
                self._unproven.add(connection)
                return True
        _logger.warning(
            "%s is turned away: %d connections are open and %d in their handshake; at most %d and %d are allowed",
            *(caller, len(self._open), len(self._unproven), MAX_CONNECTIONS, MAX_UNPROVEN_CONNECTIONS),
        )
        return False

    def _greet(self, connection: UnprovenConnection, caller: str) -> bool:
        try:
            prove_to_caller(
                connection,
                self.hello,
                secret=self.secret,
                timeout_s=self.handshake_timeout_s,
                max_frame_bytes=self.max_frame_bytes,
            )
        except ConnectionLostError as error:
            if not self._closed:
                _logger.warning("%s is turned away: %s", caller, error)
            return False
        with self._lock:
            self._unproven.discard(connection)
        return True

    def _run_handler(self, connection: UnprovenConnection, caller: str) -> None:
        try:
            self.handle(connection)
        except ConnectionLostError as error:
            _logger.info("%s left: %s", caller, error)
        except FrameError as error:
            _logger.warning("%s, %s, sent what cannot be used and is cut off: %s", caller, connection.peer, error)
