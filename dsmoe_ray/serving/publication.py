"""From the plan that routers follow to the one that is wanted, without a moment in which an expert is nowhere. Pure.

A replica is published once its host has loaded it, and taken back once all replicas that are to come are published: add
before remove, expert by expert, so that a slow host delays nobody else. What no living host holds is published at once
where it is to be, since its new host reads it when the first token wants it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan


@dataclass(frozen=True)
class Holdings:
    """What one plan says of one host."""

    warm: frozenset[LogicalExpert] = frozenset()
    cold: frozenset[LogicalExpert] = frozenset()


@dataclass(frozen=True)
class PlanIndex:
    """A plan, and what it says by host."""

    plan: PlacementPlan
    holdings: Mapping[str, Holdings] = field(default_factory=dict)

    def of(self, host_id: str) -> Holdings:
        """Return what a host holds."""
        return self.holdings.get(host_id, _NOTHING)


_NOTHING = Holdings()


def index_plan(plan: PlacementPlan) -> PlanIndex:
    """Return a plan with its holdings by host."""
    warm: dict[str, set[LogicalExpert]] = {}
    cold: dict[str, set[LogicalExpert]] = {}
    for expert, host_ids in plan.replicas.items():
        side = cold if expert in plan.cold else warm
        for host_id in host_ids:
            side.setdefault(host_id, set()).add(expert)
    holdings = {
        host_id: Holdings(frozenset(warm.get(host_id, ())), frozenset(cold.get(host_id, ())))
        for host_id in {**warm, **cold}
    }
    return PlanIndex(plan, holdings)


@dataclass(frozen=True, kw_only=True)
class Advance:
    """The next plan to publish, and what is still missing after it."""

    plan: PlacementPlan
    """The published one itself if nothing can be published yet."""
    missing: tuple[tuple[LogicalExpert, str], ...]
    """Replicas, as (expert, host id), that are wanted and not loaded."""


def advance_plan(
    published: PlacementPlan,
    target: PlacementPlan,
    *,
    hosts: Mapping[str, HostInfo],
    usable: Collection[str],
    held: Mapping[str, Collection[LogicalExpert]],
    skip_loading: bool = False,
) -> Advance:
    """Return the plan as near to the target as what is loaded allows.

    Args:
        published: What routers follow.
        target: What is wanted; names living hosts only.
        hosts: All that live.
        usable: Those of them that stay; others are in the plan only while they have to hold something.
        held: What each has loaded.
        skip_loading: Publish replicas that are not loaded too; for hosts that have no memory for new experts before
            they are rid of old ones.
    """
    replicas: dict[LogicalExpert, tuple[str, ...]] = {}
    cold: set[LogicalExpert] = set()
    missing: list[tuple[LogicalExpert, str]] = []
    for expert, wanted in target.replicas.items():
        old = tuple(host_id for host_id in published.replicas.get(expert, ()) if host_id in hosts)
        was_cold = expert in published.cold
        if expert in target.cold:
            replicas[expert] = wanted
            cold.add(expert)
            continue
        ready = wanted
        if not skip_loading:
            ready = tuple(host for host in wanted if expert in held.get(host, ()) or (host in old and not was_cold))
        if len(ready) < len(wanted):
            missing += [(expert, host_id) for host_id in wanted if host_id not in ready]
        if len(ready) == len(wanted):
            replicas[expert] = wanted
        elif old and was_cold and not ready:
            replicas[expert] = old
            cold.add(expert)
        elif ready or old:
            kept = () if was_cold else old
            replicas[expert] = (*kept, *(host_id for host_id in ready if host_id not in kept))
        else:
            replicas[expert] = wanted
    named = {host_id for host_ids in replicas.values() for host_id in host_ids} | set(usable)
    reachable = {host_id: info for host_id, info in hosts.items() if host_id in named}
    return Advance(plan=_next_plan(published, reachable, replicas, frozenset(cold)), missing=tuple(missing))


def _next_plan(
    published: PlacementPlan,
    hosts: Mapping[str, HostInfo],
    replicas: dict[LogicalExpert, tuple[str, ...]],
    cold: frozenset[LogicalExpert],
) -> PlacementPlan:
    if (published.hosts, published.replicas, published.cold) == (hosts, replicas, cold):
        return published
    return PlacementPlan(version=published.version + 1, hosts=dict(hosts), replicas=replicas, cold=cold)


def is_same_placement(one: PlacementPlan, other: PlacementPlan) -> bool:
    """Return whether two plans, whatever their versions, place all experts alike."""
    return one.replicas == other.replicas and one.cold == other.cold
