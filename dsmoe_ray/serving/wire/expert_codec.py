"""The messages between routers and expert hosts, to frames and back.

Readers check everything that a frame claims before anyone computes with it, and name the field that is wrong. Arrays
that they return are views of the frame's payloads and live as long as those.

Shape letters: T tokens of a call, D model width, K experts that a token wants at this host, P (token, expert) pairs.
"""

import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.fields import (
    check_num_payloads,
    read_array,
    read_choice,
    read_int,
    read_list,
    read_text,
)
from dsmoe_ray.serving.wire.messages import ExpertCall, ExpertRefusal, ExpertResult, Kind

DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}
"""What a hidden state's bytes are read as; bfloat16 as bare bits, since numpy does not know it."""
_DTYPE_NAMES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
_BY_NUMBER = tuple(DTYPES[name] for name in _DTYPE_NAMES)
_NUMBERS = {dtype: number for number, dtype in enumerate(_BY_NUMBER)}
_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")
_REASONS = ("not_held", "overloaded", "failed")
_MAX_SIZE = (1 << 31) - 1
_MAX_MESSAGE = 2000
_FEW_IDS = 64

# A call and a result say their numbers in one small payload, and nothing in the header: one of them travels for every
# layer of every step, and ten fields in msgpack, each to be checked, took longer than the system calls.
_CALL = struct.Struct("<QQIIIII?B?x")
_RESULT = struct.Struct("<QQQIIB3x")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """What a call's fields may be for one model."""

    num_layers: int
    num_experts: int
    d_model: int


def call_to_frame(call: ExpertCall) -> Frame:
    """Return the frame of a call; its payloads are the call's own arrays."""
    x_TD, expert_ids_TK, gates_TK = call.x_TD, call.expert_ids_TK, call.gates_TK
    dtype = DTYPES[call.dtype]
    if not (x_TD.dtype == dtype and expert_ids_TK.dtype == _INT32 and gates_TK.dtype == _FLOAT32):
        raise ValueError(
            f"x_TD must be {dtype}, expert_ids_TK int32 and gates_TK float32; "
            f"got {x_TD.dtype}, {expert_ids_TK.dtype} and {gates_TK.dtype}"
        )
    T, D = x_TD.shape
    numbers = _CALL.pack(
        *(call.call_id, call.plan_version, call.layer, call.deadline_ms, T, D, expert_ids_TK.shape[1]),
        *(call.exact, _NUMBERS[dtype], call.on_demand),
    )
    return Frame(Kind.EXPERT_CALL, {}, (numbers, expert_ids_TK.data, gates_TK.data, x_TD.data))


def call_from_frame(frame: Frame, sizes: ModelSizes) -> ExpertCall:
    """Return a call whose every field was checked; ``FrameError`` names the first that is wrong."""
    check_num_payloads(frame, 4)
    call_id, plan_version, layer, deadline_ms, T, D, K, exact, dtype, on_demand = _unpack(frame, _CALL)
    if not layer < sizes.num_layers:
        raise _out_of_range("layer", layer, 0, sizes.num_layers - 1)
    if D != sizes.d_model:
        raise _out_of_range("D", D, sizes.d_model, sizes.d_model)
    if not 1 <= T <= _MAX_SIZE:
        raise _out_of_range("T", T, 1, _MAX_SIZE)
    if not 1 <= K <= sizes.num_experts:
        raise _out_of_range("K", K, 1, sizes.num_experts)
    if dtype >= len(_BY_NUMBER):
        raise _out_of_range("dtype", dtype, 0, len(_BY_NUMBER) - 1)
    expert_ids_TK = read_array(frame, 1, "expert_ids_TK", _INT32, (T, K))
    gates_TK = read_array(frame, 2, "gates_TK", _FLOAT32, (T, K))
    check_choice(expert_ids_TK, gates_TK, sizes.num_experts)
    return ExpertCall(
        call_id=call_id,
        layer=layer,
        plan_version=plan_version,
        exact=exact,
        deadline_ms=deadline_ms,
        dtype=_DTYPE_NAMES[dtype],
        x_TD=read_array(frame, 3, "x_TD", _BY_NUMBER[dtype], (T, D)),
        expert_ids_TK=expert_ids_TK,
        gates_TK=gates_TK,
        on_demand=on_demand,
    )


def find_call_id(frame: Frame) -> int | None:
    """Return the id in the frame of a call that is wrong elsewhere, None if there is none."""
    if frame.kind != Kind.EXPERT_CALL or not frame.payloads or len(frame.payloads[0]) != _CALL.size:
        return None
    call_id: int = _CALL.unpack(frame.payloads[0])[0]
    return call_id


def result_to_frame(result: ExpertResult) -> Frame:
    """Return the frame of a result; its payload is the result's own array."""
    y = result.y
    dtype = _NUMBERS.get(y.dtype)
    if dtype is None:
        raise ValueError(f"y must be float32, or bfloat16 as uint16; got {y.dtype}")
    rows, D = y.shape
    numbers = _RESULT.pack(result.call_id, result.compute_us, result.queue_us, rows, D, dtype)
    return Frame(Kind.EXPERT_RESULT, {}, (numbers, y.data))


def result_from_frame(frame: Frame) -> ExpertResult:
    """Return a result that is sound in itself; whether it answers a call, ``check_answer`` knows."""
    check_num_payloads(frame, 2)
    call_id, compute_us, queue_us, rows, D, dtype = _unpack(frame, _RESULT)
    if dtype >= len(_BY_NUMBER):
        raise _out_of_range("dtype", dtype, 0, len(_BY_NUMBER) - 1)
    y = read_array(frame, 1, "y", _BY_NUMBER[dtype], (rows, D))
    return ExpertResult(call_id=call_id, compute_us=compute_us, queue_us=queue_us, y=y)


def check_answer(call: ExpertCall, result: ExpertResult) -> None:
    """Refuse a result whose array is not what the call asked for."""
    T, D = call.x_TD.shape
    rows = int(np.count_nonzero(call.expert_ids_TK >= 0)) if call.exact else T
    dtype = _FLOAT32 if call.exact else DTYPES[call.dtype]
    if result.y.shape != (rows, D) or result.y.dtype != dtype:
        raise FrameError(
            f"y of call {call.call_id} must be {dtype} of shape {(rows, D)}; found {result.y.dtype} of {result.y.shape}"
        )


def refusal_to_frame(refusal: ExpertRefusal) -> Frame:
    """Return the frame of a refusal."""
    message = refusal.message[:_MAX_MESSAGE]
    header = {
        "call_id": refusal.call_id,
        "reason": refusal.reason,
        "message": message,
        "missing": list(refusal.missing),
    }
    return Frame(Kind.EXPERT_REFUSAL, header)


def refusal_from_frame(frame: Frame) -> ExpertRefusal:
    """Return a refusal whose every field was checked."""
    check_num_payloads(frame, 0)
    return ExpertRefusal(
        call_id=read_int(frame, "call_id"),
        reason=read_choice(frame, "reason", _REASONS),
        message=read_text(frame, "message", max_chars=_MAX_MESSAGE),
        missing=_read_ids(frame, "missing"),
    )


def check_choice(expert_ids_TK: np.ndarray, gates_TK: np.ndarray, num_experts: int) -> None:
    """Refuse ids that do not ascend to a tail of -1 or that no expert has, and gates that do not fit them."""
    if expert_ids_TK.size <= _FEW_IDS:
        is_choice, are_gates = _judge_few(expert_ids_TK.tolist(), gates_TK.tolist(), num_experts)
    else:
        is_choice, are_gates = _judge_many(expert_ids_TK, gates_TK, num_experts)
    if not is_choice:
        raise FrameError(f"expert_ids_TK must ascend in each row from 0 to {num_experts - 1}, and then be -1")
    if not are_gates:
        raise FrameError("gates_TK must be finite, and 0 where expert_ids_TK is -1")


def _judge_few(ids: list[list[int]], gates: list[list[float]], num_experts: int) -> tuple[bool, bool]:
    """Return whether the ids are a choice, and whether the gates fit them: faster than numpy for a handful."""
    for row in ids:
        before = -1
        for expert_id in row:
            if before < expert_id < num_experts:
                before = expert_id
            elif expert_id == -1:
                before = num_experts
            else:
                return False, True
    for row, gate_row in zip(ids, gates, strict=True):
        for expert_id, gate in zip(row, gate_row, strict=True):
            # A gate that is not finite is not equal to itself less itself.
            if (gate and expert_id < 0) or gate - gate != 0.0:
                return True, False
    return True, True


def _judge_many(ids_TK: np.ndarray, gates_TK: np.ndarray, num_experts: int) -> tuple[bool, bool]:
    # Unsigned, the -1 of the tail is the largest of all, so one comparison finds every disorder.
    unsigned_TK = ids_TK.view(np.uint32)
    before, after = unsigned_TK[:, :-1], unsigned_TK[:, 1:]
    is_tail_TK = ids_TK == -1
    ascends = ((after > before) | is_tail_TK[:, 1:]).all()
    is_known = ((unsigned_TK < num_experts) | is_tail_TK).all()
    return bool(ascends and is_known), bool(np.isfinite(gates_TK).all() and not gates_TK[is_tail_TK].any())


def _unpack(frame: Frame, numbers: struct.Struct) -> tuple[Any, ...]:
    payload = frame.payloads[0]
    if len(payload) != numbers.size:
        raise FrameError(f"the numbers of a frame of kind {frame.kind} take {numbers.size} bytes; found {len(payload)}")
    return numbers.unpack(payload)


def _read_ids(frame: Frame, name: str) -> tuple[int, ...]:
    values = read_list(frame, name)
    if not all(type(value) is int and 0 <= value <= _MAX_SIZE for value in values):
        raise FrameError(f"{name} must be integers from 0 to {_MAX_SIZE}")
    return tuple(values)


def _out_of_range(name: str, value: int, low: int, high: int) -> FrameError:
    return FrameError(f"{name} must be an integer from {low} to {high}; found {value}")
