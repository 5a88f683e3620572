"""The bytes of a stream that were received and not yet given away as frames. Knows no socket.

Reads ahead, so that a small frame costs one system call, and never holds more than one frame of the allowed size plus
what was read ahead. A buffer that one giant frame made large is let go after it.
"""

from dsmoe_ray.serving.wire.codec import PREFIX_BYTES, decode_frame, read_frame_bytes
from dsmoe_ray.serving.wire.connection import Frame

_READ_AHEAD_BYTES = 1 << 16
_MAX_KEPT_BYTES = 4 << 20


class FrameBuffer:
    """Received bytes in, frames out. A frame's payloads are views of the buffer, valid until ``space`` is asked for."""

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._buffer = memoryview(bytearray(_READ_AHEAD_BYTES))
        self._start = 0
        self._end = 0
        self._frame_bytes = 0  # Of the frame at _start; 0 while its prefix is not complete.

    def take_frame(self) -> Frame | None:
        """Return the next frame if all of it is here; ``FrameError`` if the bytes are none."""
        start = self._start
        here = self._end - start
        if not self._frame_bytes:
            if here < PREFIX_BYTES:
                return None
            self._frame_bytes = read_frame_bytes(self._buffer[start : self._end], self.max_frame_bytes)
        if here < self._frame_bytes:
            return None
        self._start = start + self._frame_bytes
        self._frame_bytes = 0
        return decode_frame(self._buffer[start : self._start])

    def space(self) -> memoryview:
        """Return where the next received bytes belong, at least one byte."""
        wanted = self._frame_bytes or _READ_AHEAD_BYTES
        if self._start + wanted > len(self._buffer) or self._start == self._end:
            self._make_room(wanted)
        # The rest of a large frame exactly; before its length is known, whatever fits.
        stop = self._start + wanted if self._frame_bytes else len(self._buffer)
        return self._buffer[self._end : stop]

    def filled(self, num_bytes: int) -> None:
        """Take note that so many bytes were written into ``space``."""
        self._end += num_bytes

    def _make_room(self, num_bytes: int) -> None:
        """Move what is here to the front of a buffer that can hold ``num_bytes`` and is no larger than need be."""
        here = self._buffer[self._start : self._end]
        if num_bytes > len(self._buffer) or len(self._buffer) > max(_MAX_KEPT_BYTES, num_bytes):
            self._buffer = memoryview(bytearray(num_bytes))
        self._buffer[: len(here)] = here
        self._start, self._end = 0, len(here)
