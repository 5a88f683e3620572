"""What the processes of a serving application and its controller tell each other a few times a second. Pure data.

Each process sends a report of its own kind and is answered with orders. Reports hold all that a controller needs to
know, so that one that was just started knows everything after one round; counters are running totals, so that a report
that is lost loses nothing. No token and no tensor travels here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan

Suspicion = Literal["lost", "late"]
"""What a host is suspected of: its connection broke and cannot be made again, or it did not answer in time."""


@dataclass(frozen=True, kw_only=True)
class RouterInfo:
    """One process that runs everything but the experts, and how a gateway reaches it."""

    router_id: str
    """Never used again once its process is gone."""
    addresses: tuple[str, ...]
    """Best first, see ``wire/connection.py``."""
    node_id: str
    leaving: bool = False
    """It stops soon and takes no new requests."""


@dataclass(frozen=True, kw_only=True)
class OperatorSettings:
    """What a person told the controller. Hosts remember it, so that it outlives the controller."""

    version: int = 0
    """Grows with every change."""
    pinned: Mapping[str, int] = field(default_factory=dict)
    """Replicas of single experts, by ``layer/expert``; added to those of the configuration."""
    is_frozen: bool = False
    """Nothing is scaled or moved but what lost hosts make necessary, as after a rollback."""


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """What a host says of itself."""

    info: HostInfo
    plan_version: int
    """Of the newest plan that it knows; 0 without one."""
    held: frozenset[LogicalExpert]
    """In memory and ready to compute."""
    failures: Mapping[LogicalExpert, str] = field(default_factory=dict)
    """Experts that it was told to hold and cannot, and why."""
    num_tokens: Mapping[LogicalExpert, int] = field(default_factory=dict)
    """Tokens that each expert has computed since the process began; those with none may be absent."""
    busy_s: float = 0.0
    """Time that it has computed since it began."""
    num_threads: int = 1
    leaving: bool = False
    """It stops as soon as its experts are held elsewhere."""
    plan: PlacementPlan | None = None
    """The newest plan that it knows, where the last orders asked for it."""
    settings: OperatorSettings = OperatorSettings()
    """Those of the newest orders."""


@dataclass(frozen=True, kw_only=True)
class HostOrders:
    """What a host is to do."""

    hold: frozenset[LogicalExpert]
    """Load these now if they are not in memory, and keep them there."""
    may_hold: frozenset[LogicalExpert] = frozenset()
    """Load these when a token wants them; they may leave memory again."""
    plan: PlacementPlan | None = None
    """Newer than the one of the report."""
    send_plan: bool = False
    """Put the newest plan into the next report: this controller does not know it."""
    may_leave: bool = False
    """Nothing needs this host any more."""
    settings: OperatorSettings = OperatorSettings()


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """What a router says of itself."""

    info: RouterInfo
    plan_version: int
    """Of the newest plan that it knows; 0 without one."""
    suspected: Mapping[str, Suspicion] = field(default_factory=dict)
    """Hosts by id."""
    num_running: int = 0
    num_waiting: int = 0
    load: float = 0.0
    """Share of its sequences or its KV cache that is taken, whichever is larger; above 1 where some wait."""
    plan: PlacementPlan | None = None
    """As in ``HostReport``."""


@dataclass(frozen=True, kw_only=True)
class RouterOrders:
    """What a router is to do."""

    plan: PlacementPlan | None = None
    """Newer than the one of the report."""
    send_plan: bool = False
    """As in ``HostOrders``."""
    may_leave: bool = False
    """There is another router that stays."""


@dataclass(frozen=True, kw_only=True)
class GatewayReport:
    """What a gateway says of itself."""

    gateway_id: str
    num_requests: int = 0
    """Taken on and not finished."""
    lost_routers: frozenset[str] = frozenset()
    """Ids of those that cannot be reached."""


@dataclass(frozen=True, kw_only=True)
class GatewayOrders:
    """What a gateway is to do."""

    routers: tuple[RouterInfo, ...] | None
    """All that live; None while the controller does not know, and the gateway keeps those that it has."""
    unready_reason: str | None
    """What is missing until every token could be computed; None if nothing is."""
