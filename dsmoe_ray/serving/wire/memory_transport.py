"""Frames between threads of one process: what an application without other processes uses, and tests.

Keeps to everything that other transports do (handshake, limits, copies, back pressure, order), and to the same bytes,
so that code which works here works there.
"""

import threading

from dsmoe_ray.errors import ConfigError, ConnectionLostError
from dsmoe_ray.serving.wire.acceptance import Acceptance
from dsmoe_ray.serving.wire.byte_queue import ByteQueue
from dsmoe_ray.serving.wire.queued_connection import MAX_QUEUED_BYTES, QueuedConnection

SCHEME = "memory://"

_listeners: dict[str, "MemoryListener"] = {}
_listeners_lock = threading.Lock()


def connect(address: str, *, send_timeout_s: float) -> QueuedConnection:
    """Connect to a listener of this process, without a handshake."""
    with _listeners_lock:
        listener = _listeners.get(address)
    if listener is None:
        raise ConnectionLostError(f"cannot connect to {address}: nobody in this process listens there")
    return listener.accept(send_timeout_s)


def is_listening(address: str) -> bool:
    """Return whether a listener of this process has that address."""
    with _listeners_lock:
        return address in _listeners


class MemoryListener:
    """Accepts connections from threads of this process; see ``Listener``."""

    def __init__(self, address: str, acceptance: Acceptance, *, send_timeout_s: float) -> None:
        self.address = address
        self._acceptance = acceptance
        self._send_timeout_s = send_timeout_s
        with _listeners_lock:
            if address in _listeners:
                raise ConfigError(f"{address}: something in this process listens there already")
            _listeners[address] = self

    def accept(self, caller_send_timeout_s: float) -> QueuedConnection:
        """Make both ends of a connection; run ours on a thread, and return the caller's."""
        there: ByteQueue[bytes] = ByteQueue(MAX_QUEUED_BYTES)
        back: ByteQueue[bytes] = ByteQueue(MAX_QUEUED_BYTES)
        caller = self._acceptance.name_caller(self.address)
        ours = QueuedConnection(back, there, peer_name=caller, send_timeout_s=self._send_timeout_s)
        self._acceptance.start(ours, caller=caller)
        return QueuedConnection(there, back, peer_name=self.address, send_timeout_s=caller_send_timeout_s)

    def close(self) -> None:
        """Accept no more, and close the connections that were accepted."""
        with _listeners_lock:
            if _listeners.get(self.address) is self:
                del _listeners[self.address]
        self._acceptance.close()
