"""Frames between threads of one process: what an application without other processes uses, and tests.

Keeps to everything that other transports do (handshake, limits, copies, back pressure, order), so that code which works
here works there. Headers go through msgpack, so that a tuple arrives as a list here too.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsmoe_ray.errors import ConfigError, ConnectionLostError
from dsmoe_ray.serving.wire.acceptance import Acceptance
from dsmoe_ray.serving.wire.byte_queue import ByteQueue
from dsmoe_ray.serving.wire.codec import check_payloads, decode_header, encode_header
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.handshake import HANDSHAKE_MAX_BYTES

SCHEME = "memory://"
_MAX_QUEUED_BYTES = 16 << 20

_listeners: dict[str, "MemoryListener"] = {}
_listeners_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Packed:
    kind: int
    header: bytes
    payloads: tuple[bytes, ...]


def connect(address: str, *, timeout_s: float, send_timeout_s: float) -> "MemoryConnection":
    """Connect to a listener of this process, without a handshake; ``timeout_s`` is not needed."""
    with _listeners_lock:
        listener = _listeners.get(address)
    if listener is None:
        raise ConnectionLostError(f"cannot connect to {address}: nobody in this process listens there")
    return listener.accept(send_timeout_s)


def is_listening(address: str) -> bool:
    """Return whether a listener of this process has that address."""
    with _listeners_lock:
        return address in _listeners


class MemoryConnection:
    """One end of a stream of frames; see ``Connection``."""

    def __init__(
        self, sent: ByteQueue[_Packed], received: ByteQueue[_Packed], *, peer_name: str, send_timeout_s: float
    ) -> None:
        self.peer: Mapping[str, Any] = {}
        self._peer_name = peer_name
        self._sent = sent
        self._received = received
        self._send_timeout_s = send_timeout_s
        self._max_sent_bytes = HANDSHAKE_MAX_BYTES
        self._closed = False

    def establish(self, peer: Mapping[str, Any], *, max_sent_bytes: int, max_received_bytes: int) -> None:
        """Take down who the peer is, and the limits from now on; what may be received, the sender checks."""
        self.peer = peer
        self._max_sent_bytes = max_sent_bytes

    def send(self, frame: Frame) -> None:
        """Send a frame."""
        header = encode_header(frame.header)
        payloads, num_bytes = check_payloads(frame, len(header), self._max_sent_bytes)
        packed = _Packed(frame.kind, header, tuple(bytes(payload) for payload in payloads))
        if not self._sent.put(packed, num_bytes, self._send_timeout_s):
            ended = self._closed or self._sent.closed
            self.close()
            raise self._lost("it is closed" if ended else "it reads nothing; taken for hung")

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        """Return the next frame, None if there is none within ``timeout_s``."""
        packed = self._received.get(timeout_s)
        if packed is not None and not self._closed:
            return Frame(packed.kind, decode_header(packed.header), [memoryview(part) for part in packed.payloads])
        if self._closed or self._received.ended:
            raise self._lost("it is closed")
        return None

    def close(self) -> None:
        """End the stream."""
        self._closed = True
        self._sent.close()
        self._received.close(discard=True)

    def _lost(self, reason: str) -> ConnectionLostError:
        return ConnectionLostError(f"connection to {self._peer_name} is lost: {reason}")


class MemoryListener:
    """Accepts connections from threads of this process; see ``Listener``."""

    def __init__(self, address: str, acceptance: Acceptance, *, send_timeout_s: float) -> None:
        self.address = address
        self._acceptance = acceptance
        self._send_timeout_s = send_timeout_s
        self._num_accepted = 0
        with _listeners_lock:
            if address in _listeners:
                raise ConfigError(f"{address}: something in this process listens there already")
            _listeners[address] = self

    def accept(self, caller_send_timeout_s: float) -> MemoryConnection:
        """Make both ends of a connection; run ours on a thread, and return the caller's."""
        there: ByteQueue[_Packed] = ByteQueue(_MAX_QUEUED_BYTES)
        back: ByteQueue[_Packed] = ByteQueue(_MAX_QUEUED_BYTES)
        self._num_accepted += 1
        caller = f"caller {self._num_accepted} of {self.address}"
        ours = MemoryConnection(back, there, peer_name=caller, send_timeout_s=self._send_timeout_s)
        threading.Thread(
            target=self._acceptance.serve, args=(ours,), kwargs={"caller": caller}, name=caller, daemon=True
        ).start()
        return MemoryConnection(there, back, peer_name=self.address, send_timeout_s=caller_send_timeout_s)

    def close(self) -> None:
        """Accept no more, and close the connections that were accepted."""
        with _listeners_lock:
            if _listeners.get(self.address) is self:
                del _listeners[self.address]
        self._acceptance.close()
