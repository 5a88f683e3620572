"""A thread that tells the controller how a process is, a few times a second, and does what it answers."""

import logging
import threading
from collections.abc import Callable

from dsmoe_ray.errors import ControllerUnavailableError

_logger = logging.getLogger(__name__)


class ControlAgent:
    """Repeats one turn until it is closed. A controller that does not answer changes nothing for the process."""

    def __init__(self, name: str, turn: Callable[[], None], *, interval_s: float) -> None:
        """Begin.

        Args:
            name: Of the process, for logs.
            turn: Reports and obeys once; raises ``ControllerUnavailableError`` if nobody answers.
            interval_s: Pause between two turns.
        """
        self._name, self._turn, self._interval_s = name, turn, interval_s
        self._wake, self._is_closed = threading.Event(), False
        self._is_alone = False
        self._thread = threading.Thread(target=self._run, name=f"control {name}", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Return whether its thread lives."""
        return self._thread.is_alive()

    def wake(self) -> None:
        """Take the next turn at once."""
        self._wake.set()

    def close(self) -> None:
        """Take no more turns."""
        self._is_closed = True
        self._wake.set()

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._turn()
                if self._is_alone:
                    _logger.info("%s: the controller answers again", self._name)
                self._is_alone = False
            except ControllerUnavailableError as error:
                if not self._is_alone:
                    _logger.warning("%s goes on without a controller: %s", self._name, error)
                self._is_alone = True
            self._wake.wait(self._interval_s)
            self._wake.clear()
