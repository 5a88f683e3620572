"""Reading what a frame claims: each function returns a checked value or raises ``FrameError`` naming the field."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.wire.connection import Frame

MAX_INT = (1 << 63) - 1
MAX_TEXT = 4096


def read_int(frame: Frame, name: str, *, low: int = 0, high: int = MAX_INT) -> int:
    """Return an integer of the header that lies within bounds, both allowed."""
    value = frame.header.get(name)
    if type(value) is not int or not low <= value <= high:
        raise FrameError(f"{name} must be an integer from {low} to {high}; found {value!r:.60}")
    return value


def read_flag(frame: Frame, name: str) -> bool:
    """Return a boolean of the header."""
    value = frame.header.get(name)
    if type(value) is not bool:
        raise FrameError(f"{name} must be true or false; found {value!r:.60}")
    return value


def read_text(frame: Frame, name: str, *, max_chars: int = MAX_TEXT) -> str:
    """Return a text of the header that is not too long."""
    return check_text(frame.header.get(name), name, max_chars=max_chars)


def read_choice(frame: Frame, name: str, choices: Sequence[str]) -> Any:
    """Return a text of the header that is one of those allowed."""
    value = frame.header.get(name)
    if value not in choices:
        raise FrameError(f"{name} must be one of {', '.join(choices)}; found {value!r:.60}")
    return value


def read_list(frame: Frame, name: str) -> list[Any]:
    """Return an array of the header, whose items are yet to be checked."""
    value = frame.header.get(name)
    if type(value) is not list:
        raise FrameError(f"{name} must be an array; found {type(value).__name__}")
    return value


def read_texts(frame: Frame, name: str, *, size: int | None = None, max_chars: int = MAX_TEXT) -> list[str]:
    """Return an array of texts of the header, of ``size`` items if that is given."""
    values = read_list(frame, name)
    if (size is not None and len(values) != size) or not all(
        type(value) is str and len(value) <= max_chars for value in values
    ):
        raise FrameError(
            f"{name} must hold {_count(size)}texts of at most {max_chars} characters; found {values!r:.60}"
        )
    return values


def read_ints(frame: Frame, name: str, *, low: int = 0, size: int | None = None) -> list[int]:
    """Return an array of integers of the header, of ``size`` items if that is given."""
    values = read_list(frame, name)
    if (size is not None and len(values) != size) or not all(type(value) is int and value >= low for value in values):
        raise FrameError(f"{name} must hold {_count(size)}integers of at least {low}; found {values!r:.60}")
    return values


def _count(size: int | None) -> str:
    return "" if size is None else f"{size} "


def check_text(value: object, name: str, *, max_chars: int = MAX_TEXT) -> str:
    """Return a value that is a text and not too long."""
    if type(value) is not str or len(value) > max_chars:
        raise FrameError(f"{name} must be text of at most {max_chars} characters; found {value!r:.60}")
    return value


def check_num_payloads(frame: Frame, count: int) -> None:
    """Refuse a frame with more or fewer payloads than its kind has."""
    if len(frame.payloads) != count:
        raise FrameError(f"a frame of kind {frame.kind} has {count} payloads; found {len(frame.payloads)}")


def read_array(
    frame: Frame, index: int, name: str, dtype: np.dtype[Any], shape: tuple[int, ...] | None = None
) -> np.ndarray:
    """Return a payload as an array of the given shape, or of one dimension and whatever length it has; no copy."""
    payload = frame.payloads[index]
    found = len(payload)
    if shape is None:
        if found % dtype.itemsize:
            raise FrameError(f"{name} must take a multiple of {dtype.itemsize} bytes; found {found}")
        return np.frombuffer(payload, dtype)
    wanted = dtype.itemsize
    for size in shape:
        wanted *= size
    if found != wanted:
        raise FrameError(f"{name} of shape {shape} must take {wanted} bytes; found {found}")
    return np.ndarray(shape, dtype, payload)
