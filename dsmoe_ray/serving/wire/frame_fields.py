"""The fields of a frame that came from the wire, each checked when it is read."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.wire.connection import Buffer, Frame


class FrameFields:
    """Reads the header and the payloads of one frame; what is not as it must be is a ``FrameError``."""

    def __init__(self, frame: Frame, name: str) -> None:
        """Take a frame, and what errors call it."""
        self._frame, self._name = frame, name

    @overload
    def text(self, field: str, *, optional: Literal[False] = False) -> str: ...
    @overload
    def text(self, field: str, *, optional: bool) -> str | None: ...
    def text(self, field: str, *, optional: bool = False) -> str | None:
        """Return a string; None only if that is allowed."""
        value = self._frame.header.get(field)
        if not isinstance(value, str) and not (optional and value is None):
            raise self.error(field, "a string", value)
        return value

    def choice(self, field: str, allowed: Sequence[str]) -> str:
        """Return one of some strings."""
        value = self._frame.header.get(field)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(field, f"one of {', '.join(allowed)}", value)
        return value

    @overload
    def integer(self, field: str, *, low: int = ..., optional: Literal[False] = False) -> int: ...
    @overload
    def integer(self, field: str, *, low: int = ..., optional: bool) -> int | None: ...
    def integer(self, field: str, *, low: int = 0, optional: bool = False) -> int | None:
        """Return an integer of at least ``low``; None only if that is allowed."""
        value = self._frame.header.get(field)
        if value is None and optional:
            return None
        # Python takes True for 1.
        if type(value) is not int or value < low:
            raise self.error(field, f"an integer of at least {low}", value)
        return value

    def boolean(self, field: str) -> bool:
        """Return true or false."""
        value = self._frame.header.get(field)
        if not isinstance(value, bool):
            raise self.error(field, "true or false", value)
        return value

    def mapping(self, field: str) -> Mapping[str, Any]:
        """Return a mapping with names for keys."""
        value = self._frame.header.get(field)
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise self.error(field, "a mapping from names", value)
        return value

    def items(self, field: str, *, size: int | None = None) -> Sequence[Any]:
        """Return a list, of ``size`` items if that is given."""
        value = self._frame.header.get(field)
        if not isinstance(value, list | tuple) or (size is not None and len(value) != size):
            raise self.error(field, "a list" if size is None else f"a list of {size}", value)
        return value

    def integers(self, field: str, *, low: int, size: int | None = None) -> Sequence[int]:
        """Return a list of integers of at least ``low``."""
        values = self.items(field, size=size)
        if not all(type(value) is int and value >= low for value in values):
            raise self.error(field, f"a list of integers of at least {low}", values)
        return values

    def texts(self, field: str, *, size: int | None = None) -> Sequence[str]:
        """Return a list of strings."""
        values = self.items(field, size=size)
        if not all(isinstance(value, str) for value in values):
            raise self.error(field, "a list of strings", values)
        return values

    def payloads(self, num_payloads: int) -> Sequence[Buffer]:
        """Return the raw bytes after the header."""
        found = len(self._frame.payloads)
        if found != num_payloads:
            raise FrameError(f"{self._name} must have {num_payloads} payloads; found {found}.")
        return self._frame.payloads

    def error(self, field: str, wanted: str, found: Any) -> FrameError:
        """Return the error that a field is not as it must be."""
        return FrameError(f"{self._name}: {field} must be {wanted}; found {found!r:.100}.")
