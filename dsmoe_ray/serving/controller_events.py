"""What a controller saw and decided, for people to read: the last few thousand events. Decides nothing."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dsmoe_ray.serving.placement import PlacementEvent

EventKind = Literal[
    "rebuilt",
    "host_joined",
    "host_lost",
    "router_joined",
    "router_lost",
    "replicas",
    "published",
    "stalled",
    "operator",
]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ControllerEvent:
    """One thing that happened."""

    number: int
    """Counts from 1 in each controller's life."""
    at_unix_s: float
    kind: EventKind
    message: str
    change: PlacementEvent | None = None
    """Of which expert the replicas change, and why."""

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.kind}: {self.message}"


class EventLog:
    """The newest events; each is also logged."""

    def __init__(self, unix_clock: Callable[[], float], *, max_events: int = 4096) -> None:
        self._unix_clock = unix_clock
        self._events: deque[ControllerEvent] = deque(maxlen=max_events)
        self._num_events = 0

    def add(self, kind: EventKind, message: str, *, change: PlacementEvent | None = None) -> None:
        """Take an event down."""
        self._num_events += 1
        event = ControllerEvent(
            number=self._num_events, at_unix_s=self._unix_clock(), kind=kind, message=message, change=change
        )
        self._events.append(event)
        _logger.log(logging.WARNING if kind in ("host_lost", "router_lost", "stalled") else logging.INFO, "%s", event)

    def list_after(self, number: int = 0) -> list[ControllerEvent]:
        """Return the events after one of them, oldest first."""
        return [event for event in self._events if event.number > number]
