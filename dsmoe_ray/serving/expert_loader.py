"""Reads ordered experts into a pool, one after another on a thread of its own, and remembers which it could not."""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import DsmoeError
from dsmoe_ray.serving.expert_pool import ExpertPool
from dsmoe_ray.serving.plan import LogicalExpert

_RETRY_S = 10.0
"""How long an expert that could not be read is left alone."""

_logger = logging.getLogger(__name__)


class ExpertLoader:
    """The reader of one pool."""

    def __init__(self, pool: ExpertPool, *, name: str, now_s: Callable[[], float] = monotonic_s) -> None:
        """Start the thread, which has nothing to do yet."""
        self._pool, self._now_s = pool, now_s
        self._changed = threading.Condition()
        """Guards all that follows."""
        self._wanted: list[LogicalExpert] = []
        self._is_reading = self._is_closed = False
        self._failures: dict[LogicalExpert, tuple[float, str]] = {}
        self._thread = threading.Thread(target=self._run, name=f"load experts {name}", daemon=True)
        self._thread.start()

    def load(self, experts: Iterable[LogicalExpert]) -> None:
        """Read these, and none of those ordered before that are not among them."""
        ordered = list(experts)
        with self._changed:
            retried_s = self._now_s() - _RETRY_S
            self._failures = {
                expert: failure
                for expert in ordered
                if (failure := self._failures.get(expert)) is not None and failure[0] > retried_s
            }
            # The next one is taken from the end.
            self._wanted = [expert for expert in reversed(ordered) if expert not in self._failures]
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Return True as soon as nothing is left to read, False if that takes too long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._wanted and not self._is_reading, timeout_s)

    @property
    def failures(self) -> Mapping[LogicalExpert, str]:
        """Return what could not be read, and why."""
        with self._changed:
            return {expert: message for expert, (_, message) in self._failures.items()}

    def close(self) -> None:
        """End the thread, after the expert that it reads now."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_reading = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wanted or self._is_closed)
                if self._is_closed:
                    return
                expert = self._wanted.pop()
                self._is_reading = True
            failure = self._read(expert)
            if failure is not None:
                _logger.warning("layer %d, expert %d: %s", *expert, failure)
                with self._changed:
                    self._failures[expert] = self._now_s(), failure

    def _read(self, expert: LogicalExpert) -> str | None:
        """Return why an expert cannot be read, None if it is here now."""
        try:
            is_here = self._pool.read(expert)
        except (DsmoeError, OSError) as error:
            return str(error)
        if is_here:
            return None
        return (
            f"no room: the experts ordered to this host take more than its memory, which holds {self._pool.capacity}. "
            "Raise hosts.memory_bytes, or hosts.count."
        )
