"""What to do about a step that failed: when to try again, and who has to go if that does not help.

While an expert is unavailable nobody is to blame, and trying again is all there is to do until deadlines pass. Any
other error may be the doing of a request, most likely of one that came since the last good step: those are given up,
the last one first, until the step succeeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from dsmoe_ray.errors import ExpertUnavailableError

R = TypeVar("R")

_MIN_PAUSE_S, _MAX_PAUSE_S = 0.01, 0.5
_NUM_TRIES = 3
"""Of a step, before a request is given up."""


@dataclass(frozen=True, slots=True)
class RetryDecision(Generic[R]):
    """What a failed step calls for."""

    pause_s: float
    gives_up: bool = False
    suspect: R | None = None
    """Who is given up; None is everybody."""


class StepRetry(Generic[R]):
    """Failures since the last good step, and the requests that came since then."""

    def __init__(self, is_here: Callable[[R], bool]) -> None:
        """Take what tells whether a request has not ended meanwhile."""
        self.num_failures = 0
        self.last_error: Exception | None = None
        self._is_here = is_here
        self._suspects: list[R] = []

    def note_added(self, request: R) -> None:
        """Note a request that is in the next step for the first time."""
        self._suspects.append(request)

    def reset(self) -> None:
        """Note a step that counts, or that nobody is left."""
        self.num_failures = 0
        self.last_error = None
        self._suspects.clear()

    def decide(self, error: Exception) -> RetryDecision[R]:
        """Return what to do about a step that raised an error."""
        self.num_failures += 1
        self.last_error = error
        pause_s = min(_MIN_PAUSE_S * 2 ** min(self.num_failures - 1, 16), _MAX_PAUSE_S)
        if is_nobodys_fault(error) or self.num_failures < _NUM_TRIES:
            return RetryDecision(pause_s)
        suspect = None
        while self._suspects and suspect is None:
            last = self._suspects.pop()
            suspect = last if self._is_here(last) else None
        return RetryDecision(pause_s, gives_up=True, suspect=suspect)


def is_nobodys_fault(error: Exception) -> bool:
    """Return whether an error comes from outside, and goes away when things outside are well again."""
    return isinstance(error, ExpertUnavailableError)
