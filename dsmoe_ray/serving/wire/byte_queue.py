"""Items from several threads to one, in order, with a limit on the bytes that wait: back pressure without a socket."""

import contextlib
import queue
import threading
from typing import Generic, TypeVar

from dsmoe_ray.clock import monotonic_s

Item = TypeVar("Item")


class ByteQueue(Generic[Item]):
    """A first-in, first-out queue that knows how many bytes its items take; items take at least one.

    The taker waits in C (``SimpleQueue``): a ``Condition`` there would cost some microseconds a frame.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.closed = False
        self._items: queue.SimpleQueue[tuple[Item, int] | None] = queue.SimpleQueue()
        self._room = threading.Condition(threading.Lock())
        self._num_bytes = 0
        self._num_waiting = 0

    def put(self, item: Item, num_bytes: int, timeout_s: float | None) -> bool:
        """Append an item, waiting until it fits or is alone; False if that took too long or the queue is closed."""
        with self._room:
            if self._is_full(num_bytes):
                self._wait_for_room(num_bytes, timeout_s)
            if self.closed or self._is_full(num_bytes):
                return False
            self._num_bytes += num_bytes
            self._items.put((item, num_bytes))
        return True

    def get(self, timeout_s: float | None = None) -> Item | None:
        """Take the oldest item; None if there was none in time, or the queue is closed and empty (see ``ended``)."""
        try:
            taken = self._items.get(timeout=timeout_s) if timeout_s is None or timeout_s > 0 else self._items.get(False)
        except queue.Empty:
            return None
        if taken is None:
            self._items.put(None)  # For whoever asks again.
            return None
        item, num_bytes = taken
        with self._room:
            self._num_bytes -= num_bytes
            if self._num_waiting:
                self._room.notify_all()
        return item

    @property
    def ended(self) -> bool:
        """Whether the queue is closed and everything that was put is taken."""
        with self._room:
            return self.closed and not self._num_bytes

    def close(self, *, discard: bool = False) -> None:
        """Take no more items, and wake all who wait; drop what is there if told so."""
        with self._room:
            if discard:
                with contextlib.suppress(queue.Empty):
                    while True:
                        self._items.get(False)
                self._num_bytes = 0
            if discard or not self.closed:
                self._items.put(None)
            self.closed = True
            self._room.notify_all()

    def _is_full(self, num_bytes: int) -> bool:
        return self._num_bytes > 0 and self._num_bytes + num_bytes > self.max_bytes

    def _wait_for_room(self, num_bytes: int, timeout_s: float | None) -> None:
        deadline_s = None if timeout_s is None else monotonic_s() + timeout_s
        self._num_waiting += 1
        while self._is_full(num_bytes) and not self.closed:
            if not self._room.wait(None if deadline_s is None else deadline_s - monotonic_s()):
                break
        self._num_waiting -= 1
