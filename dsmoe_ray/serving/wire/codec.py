"""Frames to bytes and back. Trusts nothing that it reads: every length is checked before anything is made of it.

A frame is a prefix of 16 bytes (magic, kind, number of payloads, bytes of the header, bytes of all), the payloads'
lengths, the header in msgpack, and the payloads. Payloads start at multiples of 16, so that arrays in them are aligned
whatever buffer the frame lies in. Payloads are neither copied on the way out nor on the way in.
"""

import struct
from collections.abc import Mapping
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
_ALIGNMENT = 16
_PADDING = bytes(_ALIGNMENT)
# One compiled format for each number of payloads: the prefix and the payloads' lengths.
_PREFIXES = [struct.Struct(f"<4sHHII{count}I") for count in range(MAX_PAYLOADS + 1)]
_LENGTHS = [struct.Struct(f"<{count}I") for count in range(MAX_PAYLOADS + 1)]
_FIXED = _PREFIXES[0]
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


def decode_header(packed: Buffer) -> dict[str, Any]:
    """Unpack a header that came from elsewhere; ``FrameError`` if it is no mapping of plain values."""
    try:
        header = msgpack.unpackb(packed, **_UNPACK_LIMITS)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise FrameError(f"a frame's header is no msgpack within the limits: {error or type(error).__name__}") from None
    if type(header) is not dict or not all(type(key) is str for key in header):
        raise FrameError(f"a frame's header must be a mapping with text keys; found {type(header).__name__}")
    return header


def encode_frame(frame: Frame, max_frame_bytes: int) -> tuple[list[Buffer], int]:
    """Return a frame as buffers to be sent one after the other, payloads in place, and the sum of their bytes."""
    header = encode_header(frame.header)
    payloads, total = check_payloads(frame, len(header), max_frame_bytes)
    count = len(payloads)
    start = PREFIX_BYTES + 4 * count + len(header)
    prefix = _PREFIXES[count].pack(_MAGIC, frame.kind, count, len(header), total, *map(len, payloads))
    parts: list[Buffer] = [b"".join((prefix, header, _PADDING[: -start % _ALIGNMENT]))]
    for payload in payloads:
        if payload:
            parts.append(payload)
            if len(payload) % _ALIGNMENT:
                parts.append(_PADDING[: -len(payload) % _ALIGNMENT])
    return parts, total


def check_payloads(frame: Frame, header_bytes: int, max_frame_bytes: int) -> tuple[list[Buffer], int]:
    """Return a frame's payloads as plain bytes in place, and how many bytes the whole frame takes."""
    payloads = [_as_bytes(payload) for payload in frame.payloads]
    count = len(payloads)
    if count > MAX_PAYLOADS:
        raise FrameError(f"a frame of kind {frame.kind} has {count} payloads; at most {MAX_PAYLOADS} are allowed")
    start = PREFIX_BYTES + 4 * count + header_bytes
    total = start + -start % _ALIGNMENT
    for payload in payloads:
        total += len(payload) + -len(payload) % _ALIGNMENT
    check_frame_bytes(total, max_frame_bytes)
    return payloads, total


def check_frame_bytes(num_bytes: int, max_frame_bytes: int) -> None:
    """Refuse a frame that is longer than a connection allows."""
    if num_bytes > max_frame_bytes:
        raise FrameError(
            f"a frame takes {num_bytes} bytes, more than the {max_frame_bytes} that the connection allows; "
            "raise wire.max_frame_bytes or send less at once"
        )


def read_frame_bytes(received: memoryview, max_frame_bytes: int) -> int:
    """Return how many bytes the frame takes whose first ``PREFIX_BYTES`` are given."""
    magic, _, count, header_bytes, total = _FIXED.unpack_from(received)
    if magic != _MAGIC:
        raise FrameError(f"a frame starts with {_MAGIC!r}; found {bytes(magic)!r}")
    if count > MAX_PAYLOADS:
        raise FrameError(f"a frame claims {count} payloads; at most {MAX_PAYLOADS} are allowed")
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"a frame claims a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed")
    check_frame_bytes(total, max_frame_bytes)
    if total < PREFIX_BYTES + 4 * count + header_bytes:
        raise FrameError(f"a frame claims {total} bytes, fewer than its header of {header_bytes} needs")
    return int(total)


def decode_frame(received: memoryview) -> Frame:
    """Make a frame of exactly its bytes, whose prefix was checked; payloads are views of them."""
    _, kind, count, header_bytes, total = _FIXED.unpack_from(received)
    start = PREFIX_BYTES + 4 * count
    position = start + header_bytes
    header = decode_header(received[start:position])
    position += -position % _ALIGNMENT
    payloads = []
    for length in _LENGTHS[count].unpack_from(received, PREFIX_BYTES):
        payloads.append(received[position : position + length])
        position += length + -length % _ALIGNMENT
    if position != total or len(received) != total:
        raise FrameError(f"a frame claims {total} bytes, but its parts take {position}")
    return Frame(kind, header, payloads)


def decode_message(message: bytes, max_frame_bytes: int) -> Frame:
    """Make a frame of bytes that a transport delivers as one piece."""
    if len(message) < PREFIX_BYTES:
        raise FrameError(f"a frame takes at least {PREFIX_BYTES} bytes; found {len(message)}")
    received = memoryview(message)
    if read_frame_bytes(received, max_frame_bytes) != len(message):
        raise FrameError(f"a frame claims another length than the {len(message)} bytes that came")
    return decode_frame(received)


def _as_bytes(payload: Buffer) -> Buffer:
    if type(payload) is bytes:
        return payload
    view = memoryview(payload)
    if not view.nbytes:  # A view with a zero in its shape cannot be cast.
        return b""
    if view.format == "B" and view.ndim == 1 and view.c_contiguous:
        return view
    try:
        return view.cast("B")
    except TypeError as error:
        raise FrameError(f"a frame's payload must be contiguous bytes; {error}") from error
