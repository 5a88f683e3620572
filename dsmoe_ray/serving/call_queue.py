"""Calls of many connections take turns on one computer, and those that can be computed together are.

Nobody hands work to a thread that does it: whoever brings a call while nothing is computed computes it. Others wait;
when a computation ends, the call that has waited longest is next, and its own thread computes it together with all
waiting calls that can be merged with it.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from dsmoe_ray.errors import DsmoeError


class QueueFullError(DsmoeError):
    """As many calls as are allowed wait already."""


@dataclass(eq=False, kw_only=True, slots=True)
class QueuedCall:
    """What the queue knows of a call; what is to be computed, and what came of it, is in a class of the caller's."""

    key: Hashable
    """Calls with equal keys can be computed together."""
    size: int
    """How much of ``max_size`` it takes."""
    is_done: bool = False
    """Computed by another call's thread."""
    error: Exception | None = None
    turn: "threading.Lock | None" = None
    """Of a call that waits: locked until it is done or it is its turn."""


Q = TypeVar("Q", bound=QueuedCall)


class CallQueue(Generic[Q]):
    """One computation at a time, of calls that many threads bring."""

    def __init__(self, compute: Callable[[list[Q]], None], *, max_size: int, max_waiting: int) -> None:
        """Compute nothing yet.

        Args:
            compute: Computes calls of one key together and notes what comes of it; never runs twice at a time.
            max_size: Calls are merged up to this sum of sizes; a single one may be larger.
            max_waiting: Most calls that wait.
        """
        self._compute, self._max_size, self._max_waiting = compute, max_size, max_waiting
        self._lock = threading.Lock()
        self._waiting: deque[Q] = deque()
        self._is_busy = False

    @property
    def num_waiting(self) -> int:
        """Return how many calls wait for their turn."""
        return len(self._waiting)

    def run(self, call: Q) -> None:
        """Have a call computed, here or together with another thread's.

        Raises:
            QueueFullError: too many wait.
            Exception: what ``compute`` raises.
        """
        if not self._is_first(call):
            assert call.turn is not None
            call.turn.acquire()
        if not call.is_done:
            self._run_with_others(call)
        if call.error is not None:
            raise call.error

    def _is_first(self, call: Q) -> bool:
        """Begin, if nobody computes; else let a call wait."""
        with self._lock:
            if not self._is_busy:
                self._is_busy = True
                return True
            if len(self._waiting) >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} calls wait already, as many as are allowed")
            call.turn = threading.Lock()
            call.turn.acquire()
            self._waiting.append(call)
            return False

    def _run_with_others(self, call: Q) -> None:
        batch = [call]
        try:
            if self._waiting:
                batch += self._take_similar(call)
            self._compute(batch)
        except Exception as error:  # noqa: BLE001 - each caller gets it
            for one in batch:
                one.error = error
        finally:
            for one in batch[1:]:
                one.is_done = True
                _wake(one)
            self._pass_on()

    def _take_similar(self, call: Q) -> list[Q]:
        with self._lock:
            similar, others, size = [], deque[Q](), call.size
            for one in self._waiting:
                if one.key == call.key and size + one.size <= self._max_size:
                    similar.append(one)
                    size += one.size
                else:
                    others.append(one)
            self._waiting = others
        return similar

    def _pass_on(self) -> None:
        with self._lock:
            if not self._waiting:
                self._is_busy = False
                return
            following = self._waiting.popleft()
        _wake(following)


def _wake(call: QueuedCall) -> None:
    assert call.turn is not None
    call.turn.release()
