"""The messages between routers and expert hosts, to frames and back.

Readers check everything that a frame claims before anyone computes with it, and name the field that is wrong. Arrays
that they return are views of the frame's payloads and live as long as those.

Shape letters: T tokens of a call, D model width, K experts that a token wants at this host, P (token, expert) pairs.
"""

from dataclasses import dataclass

import numpy as np

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.fields import (
    check_num_payloads,
    read_array,
    read_choice,
    read_flag,
    read_int,
    read_text,
)
from dsmoe_ray.serving.wire.messages import ExpertCall, ExpertRefusal, ExpertResult, Kind

DTYPES: dict[str, np.dtype] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}
"""What a hidden state's bytes are read as; bfloat16 as bare bits, since numpy does not know it."""
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INT32, _FLOAT32 = np.dtype("<i4"), np.dtype("<f4")
_REASONS = ("not_held", "overloaded", "failed")
_MAX_SIZE = (1 << 31) - 1
_MAX_MESSAGE = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """What a call's fields may be for one model."""

    num_layers: int
    num_experts: int
    d_model: int


def call_to_frame(call: ExpertCall) -> Frame:
    """Return the frame of a call; its payloads are the call's own arrays."""
    T, D = call.x_TD.shape
    _check_own(call.x_TD, "x_TD", DTYPES[call.dtype])
    _check_own(call.expert_ids_TK, "expert_ids_TK", _INT32)
    _check_own(call.gates_TK, "gates_TK", _FLOAT32)
    header = {
        "call_id": call.call_id,
        "layer": call.layer,
        "plan_version": call.plan_version,
        "exact": call.exact,
        "deadline_ms": call.deadline_ms,
        "on_demand": call.on_demand,
        "dtype": call.dtype,
        "T": T,
        "D": D,
        "K": call.expert_ids_TK.shape[1],
    }
    return Frame(Kind.EXPERT_CALL, header, (call.x_TD.data, call.expert_ids_TK.data, call.gates_TK.data))


def call_from_frame(frame: Frame, sizes: ModelSizes) -> ExpertCall:
    """Return a call whose every field was checked; ``FrameError`` names the first that is wrong."""
    check_num_payloads(frame, 3)
    dtype = read_choice(frame, "dtype", tuple(DTYPES))
    T = read_int(frame, "T", low=1, high=_MAX_SIZE)
    D = read_int(frame, "D", low=sizes.d_model, high=sizes.d_model)
    K = read_int(frame, "K", low=1, high=sizes.num_experts)
    expert_ids_TK = read_array(frame, 1, "expert_ids_TK", _INT32, (T, K))
    gates_TK = read_array(frame, 2, "gates_TK", _FLOAT32, (T, K))
    _check_choice(expert_ids_TK, gates_TK, sizes.num_experts)
    return ExpertCall(
        call_id=read_int(frame, "call_id"),
        layer=read_int(frame, "layer", high=sizes.num_layers - 1),
        plan_version=read_int(frame, "plan_version"),
        exact=read_flag(frame, "exact"),
        deadline_ms=read_int(frame, "deadline_ms", high=_MAX_SIZE),
        dtype=dtype,
        x_TD=read_array(frame, 0, "x_TD", DTYPES[dtype], (T, D)),
        expert_ids_TK=expert_ids_TK,
        gates_TK=gates_TK,
        on_demand=read_flag(frame, "on_demand"),
    )


def result_to_frame(result: ExpertResult) -> Frame:
    """Return the frame of a result; its payload is the result's own array."""
    dtype = _DTYPE_NAMES.get(result.y.dtype)
    if dtype is None:
        raise ValueError(f"y must be float32, or bfloat16 as uint16; got {result.y.dtype}")
    rows, D = result.y.shape
    header = {
        "call_id": result.call_id,
        "compute_us": result.compute_us,
        "queue_us": result.queue_us,
        "dtype": dtype,
        "rows": rows,
        "D": D,
    }
    return Frame(Kind.EXPERT_RESULT, header, (result.y.data,))


def result_from_frame(frame: Frame) -> ExpertResult:
    """Return a result that is sound in itself; whether it answers a call, ``check_answer`` knows."""
    check_num_payloads(frame, 1)
    dtype = read_choice(frame, "dtype", tuple(DTYPES))
    rows = read_int(frame, "rows", high=_MAX_SIZE)
    D = read_int(frame, "D", low=1, high=_MAX_SIZE)
    return ExpertResult(
        call_id=read_int(frame, "call_id"),
        compute_us=read_int(frame, "compute_us"),
        queue_us=read_int(frame, "queue_us"),
        y=read_array(frame, 0, "y", DTYPES[dtype], (rows, D)),
    )


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
    header = {"call_id": refusal.call_id, "reason": refusal.reason, "message": message}
    return Frame(Kind.EXPERT_REFUSAL, header)


def refusal_from_frame(frame: Frame) -> ExpertRefusal:
    """Return a refusal whose every field was checked."""
    check_num_payloads(frame, 0)
    return ExpertRefusal(
        call_id=read_int(frame, "call_id"),
        reason=read_choice(frame, "reason", _REASONS),
        message=read_text(frame, "message", max_chars=_MAX_MESSAGE),
    )


def _check_choice(expert_ids_TK: np.ndarray, gates_TK: np.ndarray, num_experts: int) -> None:
    """Refuse ids that do not ascend to a tail of -1, that no expert has, and gates that do not fit them."""
    # Unsigned, the -1 of the tail is the largest of all, so one comparison finds every disorder.
    ids = expert_ids_TK.view(np.uint32)
    before, after = ids[:, :-1], ids[:, 1:]
    tail = np.uint32(0xFFFFFFFF)
    if not ((after > before) | (after == tail)).all():
        raise FrameError("expert_ids_TK must ascend in each row and end in -1 only")
    is_tail = ids == tail
    if not ((ids < num_experts) | is_tail).all():
        raise FrameError(f"expert_ids_TK must be -1 or from 0 to {num_experts - 1}")
    if not np.isfinite(gates_TK).all():
        raise FrameError("gates_TK must be finite")
    if (gates_TK * is_tail).any():
        raise FrameError("gates_TK must be 0 where expert_ids_TK is -1")


def _check_own(array: np.ndarray, name: str, dtype: np.dtype) -> None:
    if array.dtype != dtype or array.ndim != 2:
        raise ValueError(f"{name} must be a matrix of {dtype}; got {array.dtype} of shape {array.shape}")
