"""Decides how many replicas each expert has and where, and makes it so. Start at ``ReplicaController.step``.

Hosts, routers and gateways report and are given orders; ``step`` looks at who lives, asks ``autoscaling.py`` and
``placement.py`` what should be, and publishes as much of it as hosts have loaded. A plan that nobody follows any more
frees its replicas. Everything is rebuilt from reports after a restart. Not for more than one thread; knows no Ray.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsmoe_ray.clock import monotonic_s, unix_s
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.autoscaling import AutoscalingState, LoadObservation, decide, start_autoscaling
from dsmoe_ray.serving.config import ExpertHostsConfig, ExpertScalingConfig
from dsmoe_ray.serving.control import (
    GatewayOrders,
    GatewayReport,
    HostOrders,
    HostReport,
    OperatorSettings,
    RouterOrders,
    RouterReport,
)
from dsmoe_ray.serving.controller_events import ControllerEvent, EventLog
from dsmoe_ray.serving.demand import ExpertDemand
from dsmoe_ray.serving.fleet import Fleet, LoadDelta
from dsmoe_ray.serving.placement import Placement, plan_placement
from dsmoe_ray.serving.plan import LogicalExpert, PlacementPlan
from dsmoe_ray.serving.plan_recovery import PlanRecovery
from dsmoe_ray.serving.publication import Advance, PlanIndex, advance_plan, index_plan, is_same_placement

FIRST_WAIT_S = 10.0
"""How long the first controller waits for all hosts that are to come."""
STALLED_AFTER_S = 10.0
"""A rebalance that makes no progress for so long is reported, and again as often."""
_SUSPICION_INTERVALS = 2.5
_MAX_HISTORY = 64


@dataclass(frozen=True, kw_only=True)
class ControllerStatus:
    """What a controller knows and would do, for people to read."""

    plan: PlacementPlan
    target: PlacementPlan
    missing: tuple[tuple[LogicalExpert, str], ...]
    """Replicas, as (expert, host id), that are wanted and not loaded."""
    utilizations: dict[str, float]
    """By host id."""
    loads: dict[LogicalExpert, float]
    """Tokens per second of each expert that has any."""
    settings: OperatorSettings
    versions: tuple[int, ...]
    """Of the plans that can be rolled back to."""
    forecast: tuple[str, ...]
    """What would change if all delays had passed."""


class ReplicaController:
    """The controller of one application."""

    def __init__(
        self,
        experts: Sequence[LogicalExpert],
        *,
        expert_bytes: int,
        scaling: ExpertScalingConfig,
        hosts: ExpertHostsConfig,
        clock: Callable[[], float] = monotonic_s,
        unix_clock: Callable[[], float] = unix_s,
    ) -> None:
        """Know nothing but the model.

        Args:
            experts: All FFN experts of the model.
            expert_bytes: What each takes in memory.
            scaling: How many replicas there should be.
            hosts: How many hosts are to come, and when one is taken for dead.
            clock: Seconds that only grow.
            unix_clock: Seconds since 1970, for events.
        """
        self._experts, self._expert_bytes = tuple(experts), expert_bytes
        self._positions = {expert: position for position, expert in enumerate(self._experts)}
        self._scaling, self._clock = scaling, clock
        self.events = EventLog(unix_clock)
        self._fleet = Fleet(
            heartbeat_timeout_s=hosts.heartbeat_timeout_s,
            suspicion_timeout_s=min(_SUSPICION_INTERVALS * scaling.interval_s, hosts.heartbeat_timeout_s),
        )
        self._has_hosts = hosts.count > 0
        """Without any, routers hold all experts, and who lives is all there is to know."""
        self._recovery: PlanRecovery | None = None
        if self._has_hosts:
            self._recovery = PlanRecovery(
                num_hosts=hosts.count, first_wait_s=FIRST_WAIT_S, wait_s=hosts.heartbeat_timeout_s
            )
        self._settings = OperatorSettings()
        self._autoscaling: AutoscalingState | None = None
        self._target = PlacementPlan(version=0)
        self._published = index_plan(self._target)
        self._older: list[PlanIndex] = []
        """Plans that some router may still follow."""
        self._history: deque[PlacementPlan] = deque(maxlen=_MAX_HISTORY)
        self._missing: tuple[tuple[LogicalExpert, str], ...] = ()
        self._progress_s = clock()
        """When the last replica that was missing came, or the last complaint was made."""

    @property
    def plan(self) -> PlacementPlan:
        """Return the plan that routers follow."""
        return self._published.plan

    # Reports.

    def sync_host(self, report: HostReport) -> HostOrders:
        """Take a host's report; return what it is to do."""
        now_s = self._clock()
        host_id = report.info.host_id
        if self._fleet.see_host(report, now_s):
            self.events.add("host_joined", f"host {host_id} on node {report.info.node_id}, {len(report.held)} experts")
        if report.settings.version > self._settings.version:
            self._settings = report.settings
        if self._recovery is not None:
            self._recovery.take_host(report, now_s)
            wants_plan = self._recovery.wants_plan_of(report)
            return HostOrders(hold=report.held, send_plan=wants_plan, settings=self._settings)
        self._outbid(report.plan_version)
        holdings = self._published.of(host_id)
        hold = self._choose_held(host_id)
        return HostOrders(
            hold=hold,
            may_hold=(holdings.warm | holdings.cold) - hold,
            plan=self.plan if report.plan_version < self.plan.version else None,
            may_leave=report.leaving and not hold and not holdings.cold,
            settings=self._settings,
        )

    def sync_router(self, report: RouterReport) -> RouterOrders:
        """Take a router's report; return what it is to do."""
        if self._fleet.see_router(report, self._clock()):
            self.events.add("router_joined", f"router {report.info.router_id} on node {report.info.node_id}")
        others = [router for router in self._fleet.routers if router.router_id != report.info.router_id]
        may_leave = report.info.leaving and not all(router.leaving for router in others)
        if self._recovery is not None:
            self._recovery.take_router(report)
            return RouterOrders(send_plan=self._recovery.wants_plan_of(report), may_leave=may_leave)
        self._outbid(report.plan_version)
        plan = self.plan if report.plan_version < self.plan.version else None
        return RouterOrders(plan=plan, may_leave=may_leave)

    def sync_gateway(self, report: GatewayReport) -> GatewayOrders:
        """Take a gateway's report; return what it is to do."""
        self._fleet.see_gateway(report, self._clock())
        if self._recovery is not None:
            # Those that an earlier controller knew may not have reported yet.
            return GatewayOrders(routers=None, unready_reason="no controller knows all expert hosts yet")
        routers = tuple(router for router in self._fleet.routers if not router.leaving)
        return GatewayOrders(routers=routers or self._fleet.routers, unready_reason=self._explain_unready())

    # The loop.

    def step(self) -> None:
        """Look at who lives, decide, and publish; to be called every ``scaling.interval_s``."""
        now_s = self._clock()
        losses = self._fleet.remove_dead(now_s)
        for host_id, reason in losses.hosts.items():
            self.events.add("host_lost", f"host {host_id}: {reason}")
        for router_id, reason in losses.routers.items():
            self.events.add("router_lost", f"router {router_id}: {reason}")
        if not self._has_hosts or (self._recovery is not None and not self._finish_recovery(now_s)):
            return
        if self._fleet.host_infos:
            self._replan(now_s)
            self._publish(now_s)
        # Without any host routers keep the last plan: there is none that would serve them better.
        self._watch(now_s)

    def _finish_recovery(self, now_s: float) -> bool:
        """Go on from what reports say; return False if it is too early."""
        assert self._recovery is not None
        reports = self._fleet.host_reports
        plan = self._recovery.recover(reports, now_s)
        if plan is None:
            return False
        self._recovery = None
        if plan.version > 0:
            self.events.add("rebuilt", f"from {len(reports)} hosts and plan {plan.version}")
            # Somebody may know a plan of this version that differs.
            plan = replace(plan, version=plan.version + 1)
            self._history.append(plan)
        self._target, self._published = plan, index_plan(plan)
        counts = {expert: 0 if expert in plan.cold else len(host_ids) for expert, host_ids in plan.replicas.items()}
        self._autoscaling = start_autoscaling(self._experts, self._scaling, replicas=counts)
        self._progress_s = now_s
        return True

    def _replan(self, now_s: float) -> None:
        """Decide what should be."""
        # Where everyone leaves, those are better than nobody.
        hosts = self._fleet.find_usable_hosts(now_s) or self._fleet.host_infos
        demand = self._decide(self._fleet.take_load(), now_s)
        if self._settings.is_frozen and self._target.hosts.keys() <= hosts.keys() and self._target.replicas:
            return
        placement = plan_placement(demand, hosts, self._target, expert_bytes=self._expert_bytes)
        if placement.plan is self._target:
            return
        if is_same_placement(self._target, self.plan):
            self._progress_s = now_s
        self._tell(placement)
        self._target = placement.plan

    def _decide(self, load: LoadDelta, now_s: float) -> ExpertDemand:
        assert self._autoscaling is not None
        num_tokens_E = np.zeros(len(self._experts))
        for expert, num_tokens in load.num_tokens.items():
            num_tokens_E[self._positions[expert]] = num_tokens
        observation = LoadObservation(num_tokens_E=num_tokens_E, busy_s=load.busy_s)
        self._autoscaling, demand = decide(self._autoscaling, observation, self._effective_scaling(), now_s)
        if self._settings.is_frozen and self._target.replicas:
            counts = [
                0 if expert in self._target.cold else len(self._target.replicas[expert]) for expert in self._experts
            ]
            demand = replace(demand, replicas_E=np.array(counts, dtype=np.int64))
        return demand

    def _tell(self, placement: Placement) -> None:
        if not self._target.replicas and not self._target.version:
            num_hosts = len(placement.plan.hosts)
            self.events.add("replicas", f"first plan: {len(placement.plan.replicas)} experts on {num_hosts} hosts")
            return
        for change in placement.events:
            self.events.add("replicas", str(change), change=change)

    def _publish(self, now_s: float) -> None:
        """Publish what is loaded of what should be."""
        advance = self._advance(now_s, skip_loading=False)
        if advance.missing and not any(self._has_room(host_id) for _, host_id in advance.missing):
            advance = self._advance(now_s, skip_loading=True)
        if set(advance.missing) != set(self._missing):
            self._missing, self._progress_s = advance.missing, now_s
        self._forget_followed_plans()
        if advance.plan is not self.plan:
            self._set_plan(advance.plan)

    def _advance(self, now_s: float, *, skip_loading: bool) -> Advance:
        return advance_plan(
            self.plan,
            self._target,
            hosts=self._fleet.host_infos,
            usable=self._fleet.find_usable_hosts(now_s).keys(),
            held={host_id: report.held for host_id, report in self._fleet.host_reports.items()},
            skip_loading=skip_loading,
        )

    def _set_plan(self, plan: PlacementPlan) -> None:
        self._older = [*self._older, self._published][-_MAX_HISTORY:]
        self._published = index_plan(plan)
        self._history.append(plan)
        waiting = f", {len(self._missing)} replicas are still to be loaded" if self._missing else ""
        self.events.add("published", f"plan {plan.version}: {len(plan.hosts)} hosts{waiting}")

    def _forget_followed_plans(self) -> None:
        """Let go of plans that every router has a newer one than."""
        reports = self._fleet.router_reports.values()
        oldest = min((report.plan_version for report in reports), default=self.plan.version)
        self._older = [index for index in self._older if index.plan.version >= oldest]

    def _outbid(self, version: int) -> None:
        """Give the present plan a higher version than one that somebody brought from elsewhere."""
        if version > self.plan.version:
            self.events.add("rebuilt", f"somebody follows plan {version}; the present one goes above it")
            self._published = replace(self._published, plan=replace(self.plan, version=version + 1))
            self._history.append(self.plan)

    def _choose_held(self, host_id: str) -> frozenset[LogicalExpert]:
        """Return what a host should have in memory: what routers ask it for first, then what is to come."""
        published, target = self._published.of(host_id).warm, self._target
        stays = [expert for expert in published if host_id in target.replicas.get(expert, ())]
        older = (index.of(host_id).warm for index in reversed(self._older))
        coming = (expert for expert, missing_at in self._missing if missing_at == host_id)
        wanted = dict.fromkeys((*stays, *published, *itertools.chain.from_iterable(older), *coming))
        return frozenset(itertools.islice(wanted, self._count_places(host_id)))

    def _has_room(self, host_id: str) -> bool:
        return len(self._published.of(host_id).warm) < self._count_places(host_id)

    def _count_places(self, host_id: str) -> int:
        return self._fleet.host_infos[host_id].memory_bytes // self._expert_bytes

    def _watch(self, now_s: float) -> None:
        """Report a rebalance that makes no progress."""
        if not self._missing or now_s - self._progress_s < STALLED_AFTER_S:
            return
        expert, host_id = self._missing[0]
        report = self._fleet.host_reports.get(host_id)
        failure = "it is gone" if report is None else report.failures.get(expert, "it has not said why")
        self.events.add(
            "stalled",
            f"{len(self._missing)} replicas are not loaded after {now_s - self._progress_s:.0f} s, the first is expert "
            f"{expert.layer}/{expert.expert_id} on host {host_id}: {failure}. Tokens go on to the replicas of plan "
            f"{self.plan.version}.",
        )
        self._progress_s = now_s

    def _explain_unready(self) -> str | None:
        if self._has_hosts and not self._fleet.host_infos:
            return "no expert host is up"
        return None if self._fleet.routers else "no router is up"

    # What people ask for.

    def pin(self, expert: LogicalExpert, num_replicas: int) -> None:
        """Give an expert this many replicas whatever its load.

        Raises:
            ConfigError: there is no such expert.
        """
        self._check_expert(expert)
        name = _name(expert)
        self._change(replace(self._settings, pinned={**self._settings.pinned, name: num_replicas}))
        self.events.add("operator", f"expert {name} is pinned to {num_replicas} replicas")

    def unpin(self, expert: LogicalExpert) -> None:
        """Let load decide again; a pin of the configuration stays.

        Raises:
            ConfigError: the expert is not pinned.
        """
        name = _name(expert)
        if name not in self._settings.pinned:
            known = ", ".join(self._settings.pinned) or "none"
            raise ConfigError(f"expert {name} is not pinned; pinned are: {known}.")
        pinned = {key: count for key, count in self._settings.pinned.items() if key != name}
        self._change(replace(self._settings, pinned=pinned))
        self.events.add("operator", f"expert {name} is no longer pinned")

    def rollback(self, version: int) -> None:
        """Place experts as an earlier plan did, as far as its hosts live, and keep it so until ``resume``.

        Raises:
            ConfigError: the plan is not known any more.
        """
        found = next((plan for plan in self._history if plan.version == version), None)
        if found is None:
            known = ", ".join(str(plan.version) for plan in self._history) or "none"
            raise ConfigError(f"there is no plan {version} to roll back to; known are: {known}.")
        hosts = self._fleet.find_usable_hosts(self._clock())
        replicas, cold = dict(self._target.replicas), set(self._target.cold)
        for expert, host_ids in found.replicas.items():
            if living := tuple(host_id for host_id in host_ids if host_id in hosts):
                replicas[expert] = living
                (cold.add if expert in found.cold else cold.discard)(expert)
        self._target = replace(self._target, hosts=hosts, replicas=replicas, cold=frozenset(cold))
        self._change(replace(self._settings, is_frozen=True))
        self.events.add("operator", f"rolled back to plan {version}; nothing is scaled until resumed")

    def resume(self) -> None:
        """Scale by load again."""
        self._change(replace(self._settings, is_frozen=False))
        self.events.add("operator", "scaling by load is resumed")

    def list_events(self, after: int = 0) -> list[ControllerEvent]:
        """Return the events after one of them, oldest first."""
        return self.events.list_after(after)

    def describe(self) -> ControllerStatus:
        """Return what is and what would be if all delays had passed; changes nothing."""
        loads_E = np.zeros(0) if self._autoscaling is None else self._autoscaling.loads_E
        loads = {expert: load for expert, load in zip(self._experts, loads_E.tolist(), strict=False) if load > 0}
        return ControllerStatus(
            plan=self.plan,
            target=self._target,
            missing=self._missing,
            utilizations=dict(self._fleet.utilizations),
            loads=loads,
            settings=self._settings,
            versions=tuple(plan.version for plan in self._history),
            forecast=self._forecast(),
        )

    def _forecast(self) -> tuple[str, ...]:
        state = self._autoscaling
        hosts = self._fleet.find_usable_hosts(self._clock())
        if state is None or not hosts or self._settings.is_frozen:
            return ()
        scaling = self._effective_scaling().model_copy(update={"upscale_delay_s": 0.0, "downscale_delay_s": 0.0})
        now_s = max(self._clock(), (state.observed_at_s or 0.0) + 1e-3)
        nothing = LoadObservation(num_tokens_E=np.zeros(len(self._experts)))
        _, demand = decide(state, nothing, scaling, now_s)
        placement = plan_placement(demand, hosts, self._target, expert_bytes=self._expert_bytes)
        return tuple(str(change) for change in placement.events)

    def _effective_scaling(self) -> ExpertScalingConfig:
        if not self._settings.pinned:
            return self._scaling
        return self._scaling.model_copy(update={"pinned": {**self._scaling.pinned, **self._settings.pinned}})

    def _change(self, settings: OperatorSettings) -> None:
        self._settings = replace(settings, version=self._settings.version + 1)

    def _check_expert(self, expert: LogicalExpert) -> None:
        if expert not in self._positions:
            last = self._experts[-1]
            raise ConfigError(f"there is no expert {_name(expert)}; write layer/expert, from 0/0 to {_name(last)}.")


def _name(expert: LogicalExpert) -> str:
    return f"{expert.layer}/{expert.expert_id}"
