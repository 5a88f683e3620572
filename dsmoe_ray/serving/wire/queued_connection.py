"""A connection whose frames wait in queues, for transports that are not read from the caller's own thread."""

import logging
from collections.abc import Mapping
from typing import Any

from dsmoe_ray.errors import ConnectionLostError, FrameError
from dsmoe_ray.serving.wire.byte_queue import ByteQueue
from dsmoe_ray.serving.wire.codec import decode_message, encode_frame
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.handshake import HANDSHAKE_MAX_BYTES

MAX_QUEUED_BYTES = 16 << 20
"""What may wait in one queue; a larger frame waits alone."""

_logger = logging.getLogger(__name__)


class QueuedConnection:
    """One end of a stream of frames; see ``Connection``. A transport moves bytes between the queues of two ends."""

    def __init__(
        self, sent: ByteQueue[bytes], received: ByteQueue[bytes], *, peer_name: str, send_timeout_s: float
    ) -> None:
        self.peer: Mapping[str, Any] = {}
        self._peer_name = peer_name
        self._sent = sent
        self._received = received
        self._send_timeout_s = send_timeout_s
        self._max_sent_bytes = HANDSHAKE_MAX_BYTES
        self._max_received_bytes = HANDSHAKE_MAX_BYTES
        self._closed = False
        self._reason = "the other end closed it"

    def establish(self, peer: Mapping[str, Any], *, max_sent_bytes: int, max_received_bytes: int) -> None:
        """Take down who the peer is, and the limits from now on."""
        self.peer = peer
        self._max_sent_bytes = max_sent_bytes
        self._max_received_bytes = max_received_bytes

    def send(self, frame: Frame) -> None:
        """Send a frame."""
        parts, num_bytes = encode_frame(frame, self._max_sent_bytes)
        if not self._sent.put(b"".join(parts), num_bytes, self._send_timeout_s):
            if not self._sent.closed:
                self.lose("the other end reads nothing; taken for hung")
            raise self._lost()

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        """Return the next frame, None if there is none within ``timeout_s``."""
        message = self._received.get(timeout_s)
        if self._closed or (message is None and self._received.ended):
            raise self._lost()
        if message is None:
            return None
        try:
            return decode_message(message, self._max_received_bytes)
        except FrameError as error:
            if self.peer:  # A failed handshake is logged by whoever shakes hands.
                _logger.warning("%s, %s, is cut off: %s", self._peer_name, self.peer, error)
            self.lose(f"the other end sent what is no frame; {error}")
            raise self._lost() from error

    def close(self) -> None:
        """End the stream; what was sent before still arrives."""
        self.lose("it was closed at this end")

    def lose(self, reason: str) -> None:
        """Give the connection up for a reason that later errors tell; the first one counts."""
        if not self._closed:
            self._reason = reason
        self._closed = True
        self._sent.close()
        self._received.close(discard=True)

    def end(self, reason: str | None = None) -> None:
        """Take note that nothing more comes from the other end; what came before can still be received."""
        if reason is not None and not self._closed:
            self._reason = reason
        self._sent.close(discard=True)
        self._received.close()

    def _lost(self) -> ConnectionLostError:
        return ConnectionLostError(f"connection to {self._peer_name} is lost: {self._reason}")
