"""Frames to bytes and back. Trusts nothing that it reads: every length is checked before anything is made of it.

A frame is a prefix of 16 bytes (magic, kind, number of payloads, bytes of the header, bytes of all), the payloads'
sizes, the header in msgpack, and the payloads. Payloads start at multiples of 16, so that arrays in them are aligned
whatever buffer the frame lies in. Large payloads are not copied on the way out, none on the way in.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.wire.connection import Buffer, Frame

PREFIX_BYTES = 16
MAX_HEADER_BYTES = 1 << 20
MAX_PAYLOADS = 64
MAX_FRAME_BYTES = (1 << 32) - 16
"""What the prefix can say; connections allow less."""

_MAGIC = b"DSM1"
_MASK = 15
# What fills the space after so many bytes modulo 16.
_PADDINGS = [bytes(-num_bytes & _MASK) for num_bytes in range(_MASK + 1)]
# One compiled format for each number of payloads: the prefix and the payloads' sizes.
_PREFIXES = [struct.Struct(f"<4sHHII{count}I") for count in range(MAX_PAYLOADS + 1)]
_SIZES = [struct.Struct(f"<{count}I") for count in range(MAX_PAYLOADS + 1)]
_FIXED = _PREFIXES[0]
_EMPTY_HEADER = msgpack.packb({})
_JOINED_BYTES = 2048
"""Smaller payloads are copied to their neighbours, which costs less than one more buffer in a system call."""
# Arrays of more than this travel as payloads; a nested header can still make no more objects than it has bytes.
_UNPACK_LIMITS = {
    "raw": False,
    "strict_map_key": True,
    "max_str_len": MAX_HEADER_BYTES,
    "max_bin_len": MAX_HEADER_BYTES,
    "max_array_len": 1 << 17,
    "max_map_len": 1 << 14,
    "max_ext_len": 0,
}


def encode_header(header: Mapping[str, Any]) -> bytes:
    """Pack a header; ``FrameError`` if msgpack cannot hold it or it is too long."""
    try:
        packed: bytes = msgpack.packb(header)
    except (TypeError, ValueError, OverflowError) as error:
        raise FrameError(f"a frame's header must hold plain values only; {error}") from error
    if len(packed) > MAX_HEADER_BYTES:
        raise FrameError(
            f"a frame's header takes {len(packed)} bytes, more than the {MAX_HEADER_BYTES} allowed; "
            "send long arrays as payloads"
        )
    return packed


def encode_frame(frame: Frame, max_frame_bytes: int) -> tuple[list[Buffer], int]:
    """Return a frame as buffers to be sent one after the other, and the sum of their bytes.

    Large payloads are not copied. The buffers may be views of more than bytes; their ``nbytes`` are what counts.
    """
    kind, payloads = frame.kind, frame.payloads
    header = encode_header(frame.header) if frame.header else _EMPTY_HEADER
    sizes = []
    for payload in payloads:
        view = payload if type(payload) is memoryview else memoryview(payload)
        if not view.c_contiguous:
            raise FrameError("a frame's payload must be contiguous bytes; found a view with gaps")
        sizes.append(view.nbytes)
    count = len(sizes)
    if count > MAX_PAYLOADS:
        raise FrameError(f"a frame of kind {kind} has {count} payloads; at most {MAX_PAYLOADS} are allowed")
    start = PREFIX_BYTES + 4 * count + len(header)
    total = start + (-start & _MASK)
    for size in sizes:
        total += size + (-size & _MASK)
    if total > max_frame_bytes:
        raise _too_long(total, max_frame_bytes)
    prefix = _PREFIXES[count].pack(_MAGIC, kind, count, len(header), total, *sizes)
    return _join_small([prefix, header, _PADDINGS[start & _MASK]], payloads, sizes), total


def _join_small(joined: list[Buffer], payloads: Sequence[Buffer], sizes: Sequence[int]) -> list[Buffer]:
    """Return as few buffers as may be for what a frame begins with and its payloads, without copying large ones."""
    parts: list[Buffer] = []
    for payload, size in zip(payloads, sizes, strict=True):
        if size >= _JOINED_BYTES:
            parts.append(b"".join(joined))
            parts.append(payload)
            joined.clear()
        elif size:
            joined.append(payload)
        if size & _MASK:
            joined.append(_PADDINGS[size & _MASK])
    if joined:
        parts.append(b"".join(joined))
    return parts


Prefix = tuple[int, int, int, int]
"""Kind, number of payloads, bytes of the header, bytes of the frame."""


def read_prefix(received: memoryview, start: int, max_frame_bytes: int) -> Prefix:
    """Read the prefix of the frame that starts there, and refuse what a connection does not allow."""
    magic, kind, count, header_bytes, total = _FIXED.unpack_from(received, start)
    if magic != _MAGIC:
        raise FrameError(f"a frame starts with {_MAGIC!r}; found {magic!r}")
    if count > MAX_PAYLOADS:
        raise FrameError(f"a frame claims {count} payloads; at most {MAX_PAYLOADS} are allowed")
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"a frame claims a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if total > max_frame_bytes:
        raise _too_long(total, max_frame_bytes)
    if total < PREFIX_BYTES + 4 * count + header_bytes:
        raise FrameError(f"a frame claims {total} bytes, fewer than its header of {header_bytes} needs")
    return kind, count, header_bytes, total


def decode_frame(received: memoryview, prefix: Prefix) -> Frame:
    """Make a frame of exactly its bytes, whose prefix was read; payloads are views of them."""
    kind, count, header_bytes, total = prefix
    start = PREFIX_BYTES + 4 * count
    position = start + header_bytes
    if header_bytes == 1 and received[start] == _EMPTY_HEADER[0]:
        header = {}
    else:
        header = _decode_header(received[start:position])
    position += -position & _MASK
    payloads = []
    for size in _SIZES[count].unpack_from(received, PREFIX_BYTES):
        payloads.append(received[position : position + size])
        position += size + (-size & _MASK)
    if position != total:
        raise FrameError(f"a frame claims {total} bytes, but its parts take {position}")
    return Frame(kind, header, payloads)


def decode_message(message: bytes, max_frame_bytes: int) -> Frame:
    """Make a frame of bytes that a transport delivers as one piece."""
    if len(message) < PREFIX_BYTES:
        raise FrameError(f"a frame takes at least {PREFIX_BYTES} bytes; found {len(message)}")
    received = memoryview(message)
    prefix = read_prefix(received, 0, max_frame_bytes)
    if prefix[-1] != len(message):
        raise FrameError(f"a frame claims {prefix[-1]} bytes, but {len(message)} came")
    return decode_frame(received, prefix)


def _decode_header(packed: memoryview) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(packed, **_UNPACK_LIMITS)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise FrameError(f"a frame's header is no msgpack within the limits: {error or type(error).__name__}") from None
    if type(header) is not dict:
        raise FrameError(f"a frame's header must be a mapping; found {type(header).__name__}")
    return header


def _too_long(num_bytes: int, max_frame_bytes: int) -> FrameError:
    return FrameError(
        f"a frame takes {num_bytes} bytes, more than the {max_frame_bytes} that the connection allows; "
        "raise wire.max_frame_bytes or send less at once"
    )
