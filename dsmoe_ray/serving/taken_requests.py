"""The requests that a router has taken on and that have not ended: whose they are, how much is left, until when."""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from dsmoe_ray.serving.gateway_link import GatewayLink

_MIN_STALE = 100


@dataclass(eq=False, slots=True)
class TakenRequest:
    """A request of a gateway. The engine knows it by itself, as two gateways may use the same name."""

    gateway: GatewayLink
    wire_id: str
    """What its gateway calls it."""
    deadline_s: float
    num_unfinished: int
    """Sequences that have not ended."""
    num_outstanding_tokens: int
    """Of the prompt, and wanted."""

    def __repr__(self) -> str:
        return f"{self.wire_id} of {self.gateway.name}"


class TakenRequests:
    """All of them; for one thread."""

    def __init__(self) -> None:
        self.num_outstanding_tokens = 0
        self._of_gateway: dict[GatewayLink, dict[str, TakenRequest]] = {}
        self._all: dict[TakenRequest, None] = {}
        self._deadlines: list[tuple[float, int, TakenRequest]] = []
        """A heap; those that have ended may still be in it."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[TakenRequest]:
        return iter(list(self._all))

    def __contains__(self, taken: TakenRequest) -> bool:
        return taken in self._all

    def find(self, gateway: GatewayLink, wire_id: str) -> TakenRequest | None:
        """Return a request by its gateway's name for it."""
        return self._of_gateway.get(gateway, {}).get(wire_id)

    def list_of(self, gateway: GatewayLink) -> list[TakenRequest]:
        """Return the requests of a gateway."""
        return list(self._of_gateway.get(gateway, {}).values())

    def add(self, taken: TakenRequest) -> None:
        """Add a request with a new name."""
        self._of_gateway.setdefault(taken.gateway, {})[taken.wire_id] = taken
        self._all[taken] = None
        self.num_outstanding_tokens += taken.num_outstanding_tokens
        if len(self._deadlines) > 2 * len(self._all) + _MIN_STALE:
            # Most of them have ended long before.
            self._deadlines = [one for one in self._deadlines if one[2] in self._all]
            heapq.heapify(self._deadlines)
        heapq.heappush(self._deadlines, (taken.deadline_s, next(self._numbers), taken))

    def remove(self, taken: TakenRequest) -> None:
        """Forget a request."""
        of_gateway = self._of_gateway[taken.gateway]
        del of_gateway[taken.wire_id]
        if not of_gateway:
            del self._of_gateway[taken.gateway]
        del self._all[taken]
        self.num_outstanding_tokens -= taken.num_outstanding_tokens

    def note_token(self, taken: TakenRequest) -> None:
        """Note that a request has come a token further."""
        if taken.num_outstanding_tokens:
            taken.num_outstanding_tokens -= 1
            self.num_outstanding_tokens -= 1

    @property
    def next_deadline_s(self) -> float | None:
        """Return when ``pop_expired`` is worth a call, at the latest."""
        return self._deadlines[0][0] if self._deadlines else None

    def pop_expired(self, now_s: float) -> list[TakenRequest]:
        """Return the requests whose time is over by now; each is returned once."""
        expired = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, _, taken = heapq.heappop(self._deadlines)
            if taken in self._all:
                expired.append(taken)
        return expired
