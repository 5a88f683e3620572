"""Expert calls and their answers survive the wire, and what no call can be is refused by the name of its field."""

import dataclasses
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.wire.codec import decode_message, encode_frame
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.expert_codec import (
    ModelSizes,
    call_from_frame,
    call_to_frame,
    check_answer,
    check_choice,
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
    refusal = ExpertRefusal(call_id=9, reason="not_held", message="not here: 7 of layer 3", missing=(7,))
    assert refusal_from_frame(over_the_wire(refusal_to_frame(refusal))) == refusal
    long = dataclasses.replace(refusal, message="x" * 10_000)
    assert len(refusal_from_frame(over_the_wire(refusal_to_frame(long))).message) == 2000


# Where a call's numbers lie in its first payload, as the formats of one number each.
CALL_NUMBERS = {"layer": (16, "<I"), "T": (24, "<I"), "D": (28, "<I"), "K": (32, "<I"), "dtype": (37, "<B")}


def with_number(frame, numbers, field, value):
    offset, form = numbers[field]
    changed = bytearray(frame.payloads[0])
    struct.pack_into(form, changed, offset, value)
    return Frame(frame.kind, frame.header, [changed, *frame.payloads[1:]])


@pytest.mark.parametrize(
    ("field", "value", "blamed"),
    [
        ("layer", 4, "layer"),
        ("T", 0, "T"),
        ("T", 1 << 31, "T"),
        ("D", 7, "D"),
        ("K", 0, "K"),
        ("K", 9, "K"),
        ("dtype", 2, "dtype"),
        ("T", 2, "expert_ids_TK"),
        ("K", 2, "expert_ids_TK"),
        ("dtype", 0, "x_TD"),
    ],
)
def test_a_call_with_a_wrong_number_is_refused_by_the_name_of_the_field(field, value, blamed):
    wrong = with_number(call_to_frame(make_call()), CALL_NUMBERS, field, value)
    with pytest.raises(FrameError, match=rf"^{blamed} "):
        call_from_frame(over_the_wire(wrong), SIZES)


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


@pytest.mark.parametrize("index", range(4))
def test_a_call_with_payloads_that_are_too_short_or_missing_is_refused(index):
    frame = call_to_frame(make_call())
    payloads = list(frame.payloads)
    payloads[index] = memoryview(bytes(payloads[index])[:-2])
    with pytest.raises(FrameError, match=("numbers", "expert_ids_TK", "gates_TK", "x_TD")[index]):
        call_from_frame(over_the_wire(Frame(frame.kind, frame.header, payloads)), SIZES)
    del payloads[index]
    with pytest.raises(FrameError, match="4 payloads; found 3"):
        call_from_frame(over_the_wire(Frame(frame.kind, frame.header, payloads)), SIZES)


RESULT_NUMBERS = {"rows": (24, "<I"), "D": (28, "<I"), "dtype": (32, "<B")}


@pytest.mark.parametrize(
    ("field", "value", "blamed"), [("rows", 4, "y"), ("D", 0, "y"), ("dtype", 1, "y"), ("dtype", 9, "dtype")]
)
def test_a_wrong_result_is_refused(field, value, blamed):
    frame = result_to_frame(ExpertResult(call_id=9, compute_us=77, queue_us=5, y=np.ones((3, 6), np.float32)))
    with pytest.raises(FrameError, match=rf"^{blamed} "):
        result_from_frame(over_the_wire(with_number(frame, RESULT_NUMBERS, field, value)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("call_id", -1), ("call_id", "9"), ("reason", "tired"), ("message", 5), ("missing", [1, -1]), ("missing", 3)],
)
def test_a_wrong_refusal_is_refused(field, value):
    frame = refusal_to_frame(ExpertRefusal(call_id=9, reason="failed", message="no"))
    with pytest.raises(FrameError, match=field):
        refusal_from_frame(over_the_wire(Frame(frame.kind, {**frame.header, field: value})))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.randoms(use_true_random=False))
def test_few_and_many_ids_are_judged_alike(T, K, random):
    pool = [-1, -1, 0, 1, 2, 3, 4, 7, 8, -2, 2**31 - 1, -(2**31)]
    ids = np.array([[random.choice(pool[: random.choice([6, 12])]) for _ in range(K)] for _ in range(T)], np.int32)
    if random.random() < 0.7:
        ids = np.sort(ids.view(np.uint32), axis=1).view(np.int32)
    gates = np.array([[random.choice([0.5, 0.0, -0.5]) for _ in range(K)] for _ in range(T)], np.float32)
    if random.random() < 0.5:
        gates[ids < 0] = 0
    if random.random() < 0.2:
        gates[0, 0] = random.choice([np.nan, np.inf, -np.inf])

    def judge(copies):
        try:
            check_choice(np.tile(ids, (copies, 1)), np.tile(gates, (copies, 1)), 8)
        except FrameError as error:
            return str(error)
        return "fine"

    # Repeated often enough, the same rows are judged by the other rule.
    assert judge(1) == judge(65)


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
    with pytest.raises(ValueError, match=r"x_TD must be float32.*got float64"):
        call_to_frame(make_call(dtype="float32", x_TD=np.ones((3, 6))))
    with pytest.raises(ValueError, match="y must be float32"):
        result_to_frame(ExpertResult(call_id=1, compute_us=1, queue_us=1, y=np.ones((3, 6))))
