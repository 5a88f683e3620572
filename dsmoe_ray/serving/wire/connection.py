"""Frames, and the connections that carry them: one interface whatever lies below.

A connection is a bidirectional stream of frames between two processes that have shaken hands. Addresses choose the
transport: ``unix:///path`` on one machine, ``tcp://host:port`` in a trusted network, ``grpc://host:port`` anywhere,
``memory://name`` inside one process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes; a tensor's own memory is given as ``memoryview`` and not copied by us."""


@dataclass(slots=True)
class Frame:
    """One message: a small header, msgpack on the wire, and raw payloads. Not frozen, which would triple its cost."""

    kind: int
    """See ``wire/messages.py``."""
    header: Mapping[str, Any]
    payloads: Sequence[Buffer] = ()


class Connection(Protocol):
    """One end of a stream of frames. Sending is safe from several threads, receiving from one."""

    peer: Mapping[str, Any]
    """What the other end said of itself in the handshake."""

    def send(self, frame: Frame) -> None:
        """Send a frame. Its payloads may be used again when this returns.

        Raises:
            ConnectionLostError: the other end is gone.
            FrameError: the frame is larger than the limits allow.
        """

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        """Return the next frame, None if there is none within ``timeout_s``.

        Payloads are valid until the next call.

        Raises:
            ConnectionLostError: the other end is gone, or sent what is no frame.
        """

    def close(self) -> None:
        """End the stream; both ends' ``receive`` raises ``ConnectionLostError`` from then on. Never raises."""


class Listener(Protocol):
    """Accepts connections until it is closed."""

    address: str
    """What peers connect to; the port is filled in."""

    def close(self) -> None:
        """Accept no more, and close the connections that were accepted."""


HandleConnection = Callable[[Connection], None]
"""Called on a thread of its own for each accepted connection, which is closed when it returns."""
