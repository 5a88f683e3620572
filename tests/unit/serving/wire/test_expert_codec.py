"""Expert calls and their answers survive the wire, and what no call can be is refused by the name of its field."""

import dataclasses

import numpy as np
import pytest

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.wire.codec import decode_message, encode_frame
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.expert_codec import (
    ModelSizes,
    call_from_frame,
    call_to_frame,
    check_answer,
    refusal_from_frame,
    refusal_to_frame,
    result_from_frame,
    result_to_frame,
)
from dsmoe_ray.serving.wire.messages import ExpertCall, ExpertRefusal, ExpertResult

SIZES = ModelSizes(num_layers=4, num_experts=8, d_model=6)
IDS = np.array([[0, 3, 7], [5, -1, -1], [1, 2, -1]], np.int32)


def over_the_wire(frame):
    parts, num_bytes = encode_frame(frame, 1 << 20)
    message = b"".join(parts)
    assert len(message) == num_bytes
    return decode_message(message, 1 << 20)


def make_call(**changes):
    random = np.random.default_rng(0)
    call = ExpertCall(
        call_id=9,
        layer=3,
        plan_version=12,
        exact=False,
        deadline_ms=500,
        dtype="bfloat16",
        x_TD=random.integers(0, 1 << 16, (3, 6)).astype(np.uint16),
        expert_ids_TK=IDS,
        gates_TK=np.where(IDS < 0, 0, random.random((3, 3))).astype(np.float32),
    )
    return dataclasses.replace(call, **changes)


def assert_same(found, wanted):
    for field in dataclasses.fields(wanted):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert one.tobytes() == other.tobytes()
        else:
            assert one == other and type(one) is type(other)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("exact", "on_demand"), [(True, False), (False, True)])
def test_a_call_survives(dtype, exact, on_demand):
    x_TD = np.arange(18).reshape(3, 6).astype(np.uint16 if dtype == "bfloat16" else np.float32)
    call = make_call(dtype=dtype, exact=exact, on_demand=on_demand, x_TD=x_TD)
    assert_same(call_from_frame(over_the_wire(call_to_frame(call)), SIZES), call)


@pytest.mark.parametrize("y", [np.ones((3, 6), np.float32), np.ones((3, 6), np.uint16), np.ones((0, 6), np.float32)])
def test_a_result_survives(y):
    result = ExpertResult(call_id=9, compute_us=77, queue_us=5, y=y)
    assert_same(result_from_frame(over_the_wire(result_to_frame(result))), result)


def test_a_refusal_survives_and_its_message_is_kept_short():
    refusal = ExpertRefusal(call_id=9, reason="not_held", message="layer 3: expert 7 is not held here")
    assert refusal_from_frame(over_the_wire(refusal_to_frame(refusal))) == refusal
    long = dataclasses.replace(refusal, message="x" * 10_000)
    assert len(refusal_from_frame(over_the_wire(refusal_to_frame(long))).message) == 2000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("call_id", -1),
        ("call_id", "9"),
        ("call_id", True),
        ("layer", 4),
        ("layer", None),
        ("plan_version", 1 << 63),
        ("exact", 1),
        ("on_demand", 0),
        ("deadline_ms", -1),
        ("dtype", "float64"),
        ("dtype", ["float32"]),
        ("T", 0),
        ("T", 1 << 31),
        ("T", 2),
        ("D", 7),
        ("K", 0),
        ("K", 9),
        ("K", 2),
    ],
)
def test_a_call_with_a_wrong_header_is_refused_by_the_name_of_the_field(field, value):
    frame = call_to_frame(make_call())
    wrong = Frame(frame.kind, {**frame.header, field: value}, frame.payloads)
    # Sizes that are possible but not those of the arrays are found by the arrays.
    name = "expert_ids_TK" if value == 2 else field
    with pytest.raises(FrameError, match=name):
        call_from_frame(over_the_wire(wrong), SIZES)
    missing = Frame(frame.kind, {key: kept for key, kept in frame.header.items() if key != field}, frame.payloads)
    with pytest.raises(FrameError, match=field):
        call_from_frame(over_the_wire(missing), SIZES)


@pytest.mark.parametrize(
    "row",
    [[3, 3, -1], [4, 3, -1], [-1, 3, -1], [3, -1, 5], [0, 3, 8], [-2, -1, -1], [-2, 1, 2], [-(2**31), -1, -1]],
    ids=str,
)
def test_a_call_whose_expert_ids_are_no_ascending_choice_is_refused(row):
    ids = IDS.copy()
    ids[1] = row
    wrong = make_call(expert_ids_TK=ids, gates_TK=np.zeros((3, 3), np.float32))
    with pytest.raises(FrameError, match="expert_ids_TK"):
        call_from_frame(over_the_wire(call_to_frame(wrong)), SIZES)


@pytest.mark.parametrize("where", [(0, 0, np.nan), (0, 0, np.inf), (1, 2, 0.5)], ids=str)
def test_a_call_whose_gates_do_not_fit_its_experts_is_refused(where):
    call = make_call()
    call.gates_TK[where[:2]] = where[2]
    with pytest.raises(FrameError, match="gates_TK"):
        call_from_frame(over_the_wire(call_to_frame(call)), SIZES)


@pytest.mark.parametrize("index", range(3))
def test_a_call_with_arrays_that_are_too_short_or_missing_is_refused(index):
    frame = call_to_frame(make_call())
    payloads = list(frame.payloads)
    payloads[index] = memoryview(bytes(payloads[index])[:-2])
    with pytest.raises(FrameError, match=r"x_TD|expert_ids_TK|gates_TK"):
        call_from_frame(over_the_wire(Frame(frame.kind, frame.header, payloads)), SIZES)
    with pytest.raises(FrameError, match="3 payloads; found 2"):
        call_from_frame(Frame(frame.kind, frame.header, frame.payloads[:2]), SIZES)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rows", -1), ("rows", 4), ("D", 0), ("dtype", "int8"), ("compute_us", -1), ("queue_us", 0.5), ("call_id", None)],
)
def test_a_wrong_result_is_refused(field, value):
    frame = result_to_frame(ExpertResult(call_id=9, compute_us=77, queue_us=5, y=np.ones((3, 6), np.float32)))
    with pytest.raises(FrameError, match="y of shape" if value == 4 else field):
        result_from_frame(over_the_wire(Frame(frame.kind, {**frame.header, field: value}, frame.payloads)))


def test_an_answer_must_have_the_shape_and_type_that_the_call_asks_for():
    def answer(y):
        return ExpertResult(call_id=9, compute_us=1, queue_us=1, y=y)

    check_answer(make_call(), answer(np.ones((3, 6), np.uint16)))
    check_answer(make_call(exact=True), answer(np.ones((6, 6), np.float32)))
    wrong = [
        (make_call(), np.ones((3, 6), np.float32)),
        (make_call(), np.ones((6, 6), np.uint16)),
        (make_call(exact=True), np.ones((3, 6), np.float32)),
        (make_call(exact=True), np.ones((6, 5), np.float32)),
    ]
    for call, y in wrong:
        with pytest.raises(FrameError, match="y of call 9"):
            check_answer(call, answer(y))


def test_arrays_of_another_type_are_not_sent():
    with pytest.raises(ValueError, match="x_TD must be a matrix of float32; got float64"):
        call_to_frame(make_call(dtype="float32", x_TD=np.ones((3, 6))))
    with pytest.raises(ValueError, match="y must be float32"):
        result_to_frame(ExpertResult(call_id=1, compute_us=1, queue_us=1, y=np.ones((3, 6))))
