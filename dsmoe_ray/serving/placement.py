"""Wanted replicas onto hosts: the next plan, and an event for every change that says why. Pure, and moves little.

The plan in force is the start. Hosts that are gone leave it, surplus replicas go, missing ones come, and then loads are
made even (see ``fitting.py`` and ``balancing.py``). What memory cannot hold stays on disk, each expert with one host
that reads it when a token wants it. If nothing has to change, the plan in force is returned as it is.

Shape letters: E experts, H hosts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dsmoe_ray.serving.balancing import balance, spread_over_nodes
from dsmoe_ray.serving.demand import ExpertDemand
from dsmoe_ray.serving.fitting import add_missing, drop_surplus, grant_replicas
from dsmoe_ray.serving.packing import Packing
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan

# Sums of the same loads in another order differ in their last bits.
_ROUNDING = 1e-9
_MAX_PASSES = 4

Cause = Literal["load", "balance", "host_lost", "memory"]


@dataclass(frozen=True, kw_only=True)
class BalanceLimits:
    """When the loads of hosts are even enough."""

    slack_ratio: float = 0.015
    """Share by which a host may exceed the mean load."""
    layer_slack_ratio: float = 0.1
    """The same for the load of one layer. Layers compute one after another, so each one waits for its busiest host."""
    num_deviations: float = 3.0
    """How many standard errors of its measured load it may exceed that by before experts move. Then they move until
    it is back within the slack."""


@dataclass(frozen=True, kw_only=True)
class PlacementEvent:
    """One expert whose replicas change, and why."""

    expert: LogicalExpert
    cause: Cause
    from_replicas: int
    """Replicas in memory before, those of lost hosts included."""
    to_replicas: int
    wanted_replicas: int
    """More than ``to_replicas`` where memory or the number of hosts does not allow them."""
    added: tuple[str, ...]
    """Hosts that load it."""
    removed: tuple[str, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What made it so, by name and unit."""

    def __str__(self) -> str:
        """Say it in one line."""
        where = "".join([*(f" +{host}" for host in self.added), *(f" -{host}" for host in self.removed)])
        why = ", ".join(f"{name} {value:.4g}" for name, value in self.numbers.items())
        return (
            f"expert {self.expert.layer}/{self.expert.expert_id}: {self.from_replicas} -> {self.to_replicas} replicas"
            f"{where} ({self.cause}: {why})"
        )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A plan, and what it takes to get there."""

    plan: PlacementPlan
    """The very plan in force if nothing has to change."""
    events: tuple[PlacementEvent, ...]
    num_loads: int
    """Replicas that have to be loaded."""
    moved_bytes: int
    max_over_mean: float
    """Load of the busiest host over the mean, as expected with this plan; 1 where there is no load."""
    lacking: tuple[LogicalExpert, ...]
    """Experts that should be in memory and find no room; they are served from disk."""


def plan_placement(
    demand: ExpertDemand,
    hosts: Mapping[str, HostInfo],
    current: PlacementPlan | None,
    *,
    expert_bytes: int | np.ndarray,
    limits: BalanceLimits | None = None,
) -> Placement:
    """Return where the replicas of every expert should live.

    Args:
        demand: Replicas wanted, and loads.
        hosts: The living hosts by id.
        current: The plan in force; None at the start.
        expert_bytes: What an expert takes in memory: one number, or one for each in the order of ``demand.experts``.
        limits: When loads are even enough.
    """
    host_ids = sorted(hosts)
    start = _read(demand.experts, host_ids, current)
    packing = Packing(
        loads_E=demand.loads_E,
        bytes_E=np.broadcast_to(np.asarray(expert_bytes, dtype=np.int64), demand.loads_E.shape),
        memory_H=np.array([hosts[host_id].memory_bytes for host_id in host_ids], dtype=np.int64),
        node_H=_number([hosts[host_id].node_id for host_id in host_ids]),
        hosts_of=start.warm,
        layer_E=_number([expert.layer for expert in demand.experts]),
    )
    if host_ids:
        _pack(packing, demand, start, limits or BalanceLimits())
    return _result(packing, demand, hosts, current, start)


@dataclass(frozen=True)
class _Start:
    """The plan in force, with hosts by number and without those that are gone."""

    host_ids: list[str]
    warm: list[list[int]]
    homes: dict[int, int]
    """Host by position of a cold expert."""
    is_whole: bool
    """Whether it names every expert and no host is gone."""


def _read(experts: tuple[LogicalExpert, ...], host_ids: list[str], current: PlacementPlan | None) -> _Start:
    if current is None:
        return _Start(host_ids, [[] for _ in experts], {}, False)
    numbers = {host_id: number for number, host_id in enumerate(host_ids)}
    replicas = current.replicas
    warm = [[numbers[host_id] for host_id in replicas.get(expert, ()) if host_id in numbers] for expert in experts]
    is_whole = len(replicas) == len(experts) and sum(map(len, replicas.values())) == sum(map(len, warm))
    homes: dict[int, int] = {}
    if current.cold:
        for position, expert in enumerate(experts):
            if expert in current.cold:
                if warm[position]:
                    homes[position] = warm[position][0]
                warm[position] = []
    return _Start(host_ids, warm, homes, is_whole)


def _number(names: Sequence[str] | Sequence[int]) -> np.ndarray:
    """Return for each name its number among all of them, in ascending order."""
    return np.unique(np.array(names), return_inverse=True)[1] if names else np.zeros(0, dtype=np.int64)


def _pack(packing: Packing, demand: ExpertDemand, start: _Start, limits: BalanceLimits) -> None:
    granted_E = grant_replicas(packing, demand.replicas_E)
    packing.share_out(granted_E)
    drop_surplus(packing, granted_E)
    for expert, home in start.homes.items():
        # Where it was named it may have been read already.
        if granted_E[expert] > 0 and packing.free_H[home] >= packing.bytes_E[expert]:
            packing.add(expert, home)
    # What one step moves may open a way for another; in the end a further pass changes nothing.
    for _ in range(_MAX_PASSES):
        num_changes = packing.num_changes
        add_missing(packing, granted_E)
        spread_over_nodes(packing)
        packing.share_out(packing.counts_E)
        _even_out(packing, demand, limits)
        if packing.num_changes == num_changes:
            break


def _even_out(packing: Packing, demand: ExpertDemand, limits: BalanceLimits) -> None:
    """Make the loads of hosts even, and where layers have enough experts, also those of each layer."""
    variances_E = (demand.load_errors_E / np.maximum(packing.counts_E, 1)) ** 2
    goal = float(packing.load_H.mean()) * (1 + limits.slack_ratio + _ROUNDING)
    balance(packing, goal + limits.num_deviations * np.sqrt(packing.sum_over_hosts(variances_E)), goal)
    if not packing.is_layered:
        return
    margins_LH = limits.num_deviations * np.sqrt(packing.sum_over_cells(variances_E))
    for layer, margins_H in enumerate(margins_LH):
        layer_goal = float(packing.load_LH[layer].mean()) * (1 + limits.layer_slack_ratio + _ROUNDING)
        balance(packing, layer_goal + margins_H, layer_goal, layer=layer, ceiling=goal)


def _result(
    packing: Packing,
    demand: ExpertDemand,
    hosts: Mapping[str, HostInfo],
    current: PlacementPlan | None,
    start: _Start,
) -> Placement:
    """Turn the packed board into a plan and its events; experts that did not change keep their entries."""
    before = current.replicas if current else {}
    cold_before = current.cold if current else frozenset()
    changed = sorted(packing.changed) if start.is_whole else range(len(demand.experts))
    replicas = dict(before) if start.is_whole else {}
    homes = _homes(packing, start, changed) if start.host_ids else {}
    events = []
    for position in changed:
        expert, numbers = demand.experts[position], packing.hosts_of[position]
        chosen = numbers or ([homes[position]] if position in homes else [])
        host_ids = tuple(start.host_ids[number] for number in chosen)
        old = before.get(expert, ())
        replicas[expert] = old if len(old) == len(host_ids) and set(old) == set(host_ids) else host_ids
        warm_before = () if expert in cold_before else old
        warm_after = replicas[expert] if numbers else ()
        if set(warm_before) != set(warm_after):
            events.append(_event(position, demand, warm_before, warm_after, hosts))
    cold = (cold_before if start.is_whole else frozenset()).difference(demand.experts[position] for position in changed)
    cold = cold.union(demand.experts[position] for position in homes)
    return _placement(packing, demand, events, (hosts, replicas, cold), current)


def _homes(packing: Packing, start: _Start, changed: Iterable[int]) -> dict[int, int]:
    """Return the host of those experts that are not in memory: where it was, or the one with the fewest such."""
    homes: dict[int, int] = {}
    homeless = []
    for expert in changed:
        if packing.hosts_of[expert]:
            continue
        if expert in start.homes:
            homes[expert] = start.homes[expert]
        elif start.warm[expert]:
            homes[expert] = start.warm[expert][0]
        else:
            homeless.append(expert)
    if homeless:
        counts_H = np.bincount(list(homes.values()), minlength=packing.num_hosts)
        for expert in homeless:
            homes[expert] = int(np.argmin(counts_H))
            counts_H[homes[expert]] += 1
    return homes


def _event(
    position: int,
    demand: ExpertDemand,
    before: tuple[str, ...],
    after: tuple[str, ...],
    hosts: Mapping[str, HostInfo],
) -> PlacementEvent:
    wanted = int(demand.replicas_E[position])
    cause: Cause = "balance" if len(before) == len(after) else "load"
    if len(after) < min(wanted, max(1, len(hosts))) and len(after) < len(before):
        cause = "memory"
    if any(host_id not in hosts for host_id in before):
        cause = "host_lost"
    numbers = {"tokens_per_s": float(demand.loads_E[position]), "wanted_replicas": float(wanted)}
    if demand.replica_load is not None:
        numbers["target_tokens_per_s_of_a_replica"] = demand.replica_load
    return PlacementEvent(
        expert=demand.experts[position],
        cause=cause,
        from_replicas=len(before),
        to_replicas=len(after),
        wanted_replicas=wanted,
        added=tuple(host_id for host_id in after if host_id not in before),
        removed=tuple(host_id for host_id in before if host_id not in after),
        numbers=numbers,
    )


def _placement(
    packing: Packing,
    demand: ExpertDemand,
    events: list[PlacementEvent],
    content: tuple[Mapping[str, HostInfo], dict[LogicalExpert, tuple[str, ...]], frozenset[LogicalExpert]],
    current: PlacementPlan | None,
) -> Placement:
    hosts, replicas, cold = content
    if not hosts:
        replicas = {}
    if current and (current.hosts, current.replicas, current.cold) == (hosts, replicas, cold):
        plan = current
    else:
        version = current.version + 1 if current else 1
        plan = PlacementPlan(version=version, hosts=dict(hosts), replicas=replicas, cold=cold)
    sizes = dict(zip(demand.experts, packing.bytes_E.tolist(), strict=True)) if events else {}
    total = float(packing.load_H.sum())
    return Placement(
        plan=plan,
        events=tuple(events),
        num_loads=sum(len(event.added) for event in events),
        moved_bytes=sum(sizes[event.expert] * len(event.added) for event in events),
        max_over_mean=float(packing.load_H.max()) / total * packing.num_hosts if total > 0 else 1.0,
        lacking=tuple(
            demand.experts[position] for position in np.flatnonzero((demand.replicas_E > 0) & (packing.counts_E == 0))
        ),
    )
