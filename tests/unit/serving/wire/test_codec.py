"""Frames survive as bytes however those are cut; any other bytes are refused, at a bounded cost of memory."""

import itertools
import struct

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.wire.codec import MAX_PAYLOADS, decode_message, encode_frame
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.frame_buffer import FrameBuffer

LIMIT = 1 << 20
# A busy machine may take long over any example.
quick = settings(max_examples=40, deadline=None)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)
# Sizes around the alignment, the joining of small payloads, and what is read ahead.
SIZES = st.sampled_from([0, 1, 15, 16, 17, 2047, 2048, 2049, 65_400, 65_536, 70_001])
FRAMES = st.builds(
    lambda kind, header, sizes: (kind, header, [bytes([size % 251]) * size for size in sizes]),
    st.integers(0, 65_535),
    st.dictionaries(st.text(max_size=4), PLAIN, max_size=4),
    st.lists(SIZES, max_size=4),
)


def pack(kind, header, payloads):
    parts, num_bytes = encode_frame(Frame(kind, header, payloads), LIMIT)
    message = b"".join(parts)
    assert len(message) == num_bytes and num_bytes % 16 == 0
    return message


def unpack(frame):
    return frame.kind, frame.header, [bytes(payload) for payload in frame.payloads]


def feed(received, message):
    """Give bytes to a buffer as a socket would, and return the frames that come out."""
    frames = []
    while message:
        space = received.space()
        chunk, message = message[: len(space)], message[len(space) :]
        space[: len(chunk)] = chunk
        received.filled(len(chunk))
        while (frame := received.take_frame()) is not None:
            frames.append(unpack(frame))
    return frames


@quick
@given(FRAMES)
@example((0, {}, []))
@example((1, {}, [b""] * MAX_PAYLOADS))
def test_a_frame_survives_as_bytes(frame):
    assert unpack(decode_message(pack(*frame), LIMIT)) == frame


@quick
@given(st.lists(FRAMES, max_size=5), st.lists(st.integers(0, 200_000), max_size=8))
def test_a_stream_of_frames_may_be_cut_anywhere(frames, cuts):
    stream = b"".join(pack(*frame) for frame in frames)
    bounds = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    received, found = FrameBuffer(LIMIT), []
    for start, stop in itertools.pairwise(bounds):
        found += feed(received, stream[start:stop])
    assert found == frames


@quick
@given(FRAMES, st.data())
def test_a_damaged_frame_is_a_frame_or_refused(frame, data):
    message = bytearray(pack(*frame))
    for _ in range(data.draw(st.integers(1, 4))):
        # Mostly where the numbers are.
        place = data.draw(st.integers(0, min(48, len(message) - 1)) | st.integers(0, len(message) - 1))
        message[place] = data.draw(st.integers(0, 255))
    received = FrameBuffer(LIMIT)
    try:
        feed(received, bytes(message))
        decode_message(bytes(message), LIMIT)
    except FrameError as error:
        assert len(str(error)) < 500
    assert len(received.space()) <= LIMIT


@quick
@given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    with pytest.raises(FrameError):
        decode_message(noise, LIMIT)
    received = FrameBuffer(LIMIT)
    if len(noise) >= 16:
        with pytest.raises(FrameError):
            feed(received, noise)
    else:
        assert feed(received, noise) == []


@quick
@given(FRAMES, st.integers(1, 400))
def test_a_frame_that_is_cut_off_never_comes_out(frame, missing):
    message = pack(*frame)
    cut = message[: max(0, len(message) - missing)]
    assert feed(FrameBuffer(LIMIT), cut) == []
    with pytest.raises(FrameError):
        decode_message(cut, LIMIT)


def claim(*, magic=b"DSM1", kind=1, num_payloads=0, header_bytes=1, frame_bytes=32):
    return struct.pack("<4sHHII", magic, kind, num_payloads, header_bytes, frame_bytes)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (claim(magic=b"HTTP"), "starts with"),
        (claim(magic=b"DSM2"), "starts with"),
        (claim(num_payloads=65, frame_bytes=1024), "65 payloads; at most 64"),
        (claim(header_bytes=(1 << 20) + 1, frame_bytes=LIMIT), "header of 1048577 bytes; at most 1048576"),
        (claim(frame_bytes=LIMIT + 1), "1048577 bytes, more than the 1048576"),
        (claim(frame_bytes=0xFFFFFFFF), "more than the 1048576"),
        (claim(header_bytes=17), "fewer than its header"),
        (claim(num_payloads=5), "fewer than its header"),
    ],
)
def test_an_impossible_prefix_is_refused_before_anything_is_allocated(prefix, message):
    received = FrameBuffer(LIMIT)
    with pytest.raises(FrameError, match=message):
        feed(received, prefix)
    assert len(received.space()) <= 1 << 16


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xc1", "msgpack"),
        (msgpack.packb([1]), "mapping; found list"),
        (msgpack.packb({1: 2}), "msgpack"),
        (b"\x80\x80", "msgpack"),
        (msgpack.packb({"a": "b"})[:-1], "msgpack"),
        (b"\x81\xa1a\xa1\xff", "msgpack"),
        (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "msgpack"),
        (b"\x81\xa1a" + b"\x91" * 5000 + b"\xc0", "msgpack"),
        (b"\x81\xa1a\xdd" + struct.pack(">I", 1 << 31), "msgpack"),
        (b"\x81\xa1a\xdb" + struct.pack(">I", 1 << 31), "msgpack"),
        (b"\xdf" + struct.pack(">I", 1 << 31), "msgpack"),
    ],
    ids=["unused", "list", "number as key", "more after", "cut", "no text", "type", "deep", "array", "text", "map"],
)
def test_a_header_that_is_no_plain_mapping_is_refused(header, message):
    body = header + bytes(-len(header) % 16)
    wrong = claim(header_bytes=len(header), frame_bytes=16 + len(body)) + body
    with pytest.raises(FrameError, match=message):
        decode_message(wrong, LIMIT)


def test_sizes_that_do_not_add_up_are_refused():
    message = bytearray(pack(1, {}, [b"x" * 32, b"y" * 32]))
    struct.pack_into("<I", message, 16, 0xFFFFFFF0)
    with pytest.raises(FrameError, match="parts take"):
        decode_message(bytes(message), LIMIT)


def test_a_buffer_that_a_giant_frame_made_large_is_let_go():
    received = FrameBuffer(16 << 20)
    parts, _ = encode_frame(Frame(1, {}, [bytes(8 << 20)]), 16 << 20)
    assert len(feed(received, b"".join(parts))) == 1
    assert len(received.space()) == 1 << 16
