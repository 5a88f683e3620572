"""SIGTERM and Ctrl-C as a request that the coordinator reads between two moves; the second one ends the process."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequestedError(Exception):
    """The run is to stop, and there is nothing to finish first."""


class StopRequest:
    """Whether the run was told to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._is_awaited = False

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Mark a block that looks at ``requested`` itself; elsewhere a request raises at once."""
        if self.requested:
            raise StopRequestedError
        self._is_awaited = True
        try:
            yield
        finally:
            self._is_awaited = False

    def request(self) -> None:
        """Ask for an end.

        Raises:
            StopRequestedError: nothing looks at the request.
        """
        self.requested = True
        if not self._is_awaited:
            raise StopRequestedError


@contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """Turn the first SIGTERM or SIGINT into a request, for as long as the block lasts; the second ends the process.

    Ray starts its processes with SIGINT blocked, so Ctrl-C reaches this process alone and the shards live to save. Call
    it after ``ray.init``, which installs a handler of its own.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            sys.stderr.write("\nStopped at once; the checkpoints on disk are whole.\n")
            sys.stderr.flush()
            os._exit(128 + number)
        stop.request()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
