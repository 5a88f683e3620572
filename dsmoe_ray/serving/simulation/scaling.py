"""Every expert scaled on its own, in a simulated cluster: runs the decision code of a serving application.

What a cluster adds to the decisions is time: a plan comes into force when its replicas have been loaded, and until
then no other is made; a host serves some time after it was asked for.

Shape letters: E experts, H hosts, R replicas.
"""

import numpy as np

from dsmoe_ray.serving.autoscaling import (
    HostPoolObservation,
    HostPoolState,
    LoadObservation,
    compute_hosts_wanted,
    decide,
    decide_hosts,
    start_autoscaling,
)
from dsmoe_ray.serving.config import ExpertHostsConfig
from dsmoe_ray.serving.demand import ExpertDemand
from dsmoe_ray.serving.placement import Placement, plan_placement
from dsmoe_ray.serving.plan import LogicalExpert, PlacementPlan
from dsmoe_ray.serving.simulation.cluster import Routes, TimeTaken, WindowOutcome, make_hosts, make_one_each
from dsmoe_ray.serving.simulation.config import SimulationConfig
from dsmoe_ray.serving.simulation.queueing import LatencyHistogram, serve_window


class ScalingSystem:
    """Every expert scaled on its own, and hosts by their utilization: the code that the controller runs."""

    name = "dsmoe"

    def __init__(self, experts: tuple[LogicalExpert, ...], first_loads_E: np.ndarray, config: SimulationConfig) -> None:
        """Begin in the state that the first loads would have led to."""
        self.config, self.experts = config, experts
        self.pool = ExpertHostsConfig(count=config.min_hosts, max_count=config.hosts)
        self.state = start_autoscaling(experts, config.experts)
        self.host_ids: list[str] = []
        utilization = float(first_loads_E.sum()) / config.tokens_per_host_s
        first = self._observe_hosts((utilization,))
        self.pool_state = HostPoolState(num_hosts=compute_hosts_wanted(first, self.pool, config.experts, current=0))
        self.starting: list[tuple[float, int]] = []
        demand = make_one_each(experts, first_loads_E)
        self.hosts = make_hosts(self.pool_state.num_hosts, config)
        began = TimeTaken.start()
        placement = plan_placement(demand, self.hosts, None, expert_bytes=config.expert_bytes)
        self.first_plan = began.until_now()
        self.pending: tuple[float, Placement] | None = None
        self.backlogs: dict[str, float] = {}
        self._publish(placement.plan)
        self.utilizations: dict[str, float] = {}

    def step(self, tokens_E: np.ndarray, now_s: float, histogram: LatencyHistogram) -> WindowOutcome:
        """Serve a window by the plan in force; then decide, place, and publish what has been loaded."""
        window_s = self.config.experts.interval_s
        arrivals_H = self.routes.arrivals(tokens_E)
        backlogs_H = np.array([self.backlogs.get(host_id, 0.0) for host_id in self.host_ids])
        served = serve_window(arrivals_H, backlogs_H, window_s, self.config)
        self.backlogs = dict(zip(self.host_ids, served.backlogs.tolist(), strict=True))
        num_cold = self._count_latencies(tokens_E, arrivals_H, served.latencies_s, histogram)
        self._remember_utilizations(served.utilizations, window_s)
        used = (len(self.host_ids) + sum(num for _, num in self.starting), self._num_replicas())
        began = TimeTaken.start()
        observation = LoadObservation(num_tokens_E=tokens_E, busy_s=float(served.busy_s.sum()))
        self.state, demand = decide(self.state, observation, self.config.experts, now_s)
        placement = self._place(demand, now_s)
        decision = began.until_now()
        return WindowOutcome(
            num_hosts=used[0],
            num_replicas=used[1],
            num_loads=placement.num_loads if placement else 0,
            num_cold_tokens=num_cold,
            highest_utilization=float(served.utilizations.max()),
            decision=decision,
            events=placement.events if placement else (),
        )

    def _count_latencies(
        self, tokens_E: np.ndarray, arrivals_H: np.ndarray, latencies_s: np.ndarray, histogram: LatencyHistogram
    ) -> float:
        """Add this window's latencies; return the tokens that waited for an expert to be loaded."""
        cold = np.flatnonzero(self.routes.is_cold_E & (tokens_E > 0))
        if not len(cold):
            histogram.add(latencies_s, arrivals_H)
            return 0.0
        is_cold_R = np.isin(self.routes.expert_R, cold)
        tokens_R = tokens_E[self.routes.expert_R] * self.routes.share_R
        latencies_R = latencies_s[self.routes.host_R] + np.where(is_cold_R, self.config.load_s, 0.0)
        histogram.add(latencies_R, tokens_R)
        return float(tokens_E[cold].sum())

    def _remember_utilizations(self, utilizations_H: np.ndarray, window_s: float) -> None:
        keep = 0.5 ** (window_s / self.config.experts.look_back_s)
        self.utilizations = {
            host_id: keep * self.utilizations.get(host_id, now) + (1 - keep) * now
            for host_id, now in zip(self.host_ids, utilizations_H.tolist(), strict=True)
        }

    def _num_replicas(self) -> int:
        """Return the replicas in memory; while a plan is being loaded, its own and those of the plan in force."""
        return self.routes.num_replicas + (self.pending[1].num_loads if self.pending else 0)

    def _observe_hosts(self, utilizations: tuple[float, ...]) -> HostPoolObservation:
        num_warm = int((self.state.replicas_E > 0).sum())
        return HostPoolObservation(
            utilizations=utilizations,
            needed_bytes=num_warm * self.config.expert_bytes,
            host_memory_bytes=self.config.memory_bytes,
        )

    def _place(self, demand: ExpertDemand, now_s: float) -> Placement | None:
        """Plan anew unless a plan is being loaded; return the placement that begins to load, if any."""
        self._scale_hosts(now_s)
        if self.pending:
            ready_s, placement = self.pending
            if now_s < ready_s:
                return None
            self._publish(placement.plan)
        placement = plan_placement(demand, self.hosts, self.plan, expert_bytes=self.config.expert_bytes)
        if placement.plan is self.plan:
            return None
        loads: dict[str, int] = {}
        for event in placement.events:
            for host_id in event.added:
                loads[host_id] = loads.get(host_id, 0) + 1
        self.pending = (now_s + max(loads.values(), default=0) * self.config.load_s, placement)
        return placement

    def _scale_hosts(self, now_s: float) -> None:
        """Decide on the number of hosts; new ones come after their start, the newest go at once."""
        before = self.pool_state.num_hosts
        observation = self._observe_hosts(tuple(self.utilizations.values()))
        self.pool_state, wanted = decide_hosts(self.pool_state, observation, self.pool, self.config.experts, now_s)
        if wanted > before:
            self.starting.append((now_s + self.config.host_start_s, wanted - before))
        for surplus in range(before - wanted, 0, -1):
            # A host that has not come yet is called off first.
            if not self.starting:
                self.hosts = make_hosts(len(self.hosts) - surplus, self.config)
                break
            ready_s, num = self.starting.pop()
            if num > 1:
                self.starting.append((ready_s, num - 1))
        num_ready = sum(num for ready_s, num in self.starting if ready_s <= now_s)
        if num_ready:
            self.starting = [(ready_s, num) for ready_s, num in self.starting if ready_s > now_s]
            self.hosts = make_hosts(len(self.hosts) + num_ready, self.config)

    def _publish(self, plan: PlacementPlan) -> None:
        self.plan = plan
        self.pending = None
        self.host_ids = sorted(plan.hosts)
        self.routes = Routes(plan, self.experts, self.host_ids)
