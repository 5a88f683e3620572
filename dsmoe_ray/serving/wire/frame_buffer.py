"""The bytes of a stream that were received and not yet given away as frames. Knows no socket.

Reads ahead, so that a small frame costs one system call, and never holds more than one frame of the allowed size plus
what was read ahead. A buffer that one giant frame made large is let go after it.
"""

from dsmoe_ray.serving.wire.codec import PREFIX_BYTES, Prefix, decode_frame, read_prefix
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
        self._prefix: Prefix | None = None  # Of the frame at _start, once it is here.

    def take_frame(self) -> Frame | None:
        """Return the next frame if all of it is here; ``FrameError`` if the bytes are none."""
        start = self._start
        here = self._end - start
        prefix = self._prefix
        if prefix is None:
            if here < PREFIX_BYTES:
                return None
            self._prefix = prefix = read_prefix(self._buffer, start, self.max_frame_bytes)
        frame_bytes = prefix[-1]
        if here < frame_bytes:
            return None
        self._prefix = None
        self._start = start + frame_bytes
        return decode_frame(self._buffer[start : self._start], prefix)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was received that was not given away."""
        return self._start == self._end

    @property
    def wants_all(self) -> bool:
        """Whether ``space`` is what a frame still lacks, and no byte more."""
        return self._prefix is not None

    def space(self) -> memoryview:
        """Return where the next received bytes belong, at least one byte."""
        prefix = self._prefix
        if self._start == self._end and len(self._buffer) <= _MAX_KEPT_BYTES:
            self._start = self._end = 0
            return self._buffer
        wanted = _READ_AHEAD_BYTES if prefix is None else prefix[-1]
        if self._start == self._end or self._start + wanted > len(self._buffer):
            self._make_room(wanted)
        # The rest of a large frame exactly; before its size is known, whatever fits.
        stop = len(self._buffer) if prefix is None else self._start + wanted
        return self._buffer[self._end : stop]

    def filled(self, num_bytes: int) -> None:
        """Take note that so many bytes were written into ``space``."""
        self._end += num_bytes

    def _make_room(self, num_bytes: int) -> None:
        """Move what is here to the front of a buffer that can hold ``num_bytes`` and is no larger than need be."""
        here = self._end - self._start
        old = self._buffer
        if num_bytes > len(old) or len(old) > max(_MAX_KEPT_BYTES, num_bytes):
            self._buffer = memoryview(bytearray(num_bytes))
        if here:
            self._buffer[:here] = old[self._start : self._end]
        self._start, self._end = 0, here
