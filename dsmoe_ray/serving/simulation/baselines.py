"""The baselines, each as good as its kind can be.

Whole-model replicas scale by the same target and delays on the utilization of their busiest host, in units of all
experts, on as many hosts as that takes. Fixed experts have one replica each on all hosts. Both are packed by the mean
loads of the whole trace, which nobody knows beforehand.

Shape letters: E experts, H hosts.
"""

import math

import numpy as np

from dsmoe_ray.serving.autoscaling import HostPoolObservation, HostPoolState, compute_hosts_wanted, decide_hosts
from dsmoe_ray.serving.config import ExpertHostsConfig
from dsmoe_ray.serving.placement import plan_placement
from dsmoe_ray.serving.plan import LogicalExpert
from dsmoe_ray.serving.simulation.cluster import Routes, WindowOutcome, make_hosts, make_one_each
from dsmoe_ray.serving.simulation.config import SimulationConfig
from dsmoe_ray.serving.simulation.queueing import LatencyHistogram, serve_window

_UNBOUNDED = 1_000_000


class FixedSystem:
    """One replica of each expert, on all hosts, packed once by loads that it knows beforehand."""

    name = "fixed one-replica experts"

    def __init__(self, experts: tuple[LogicalExpert, ...], mean_loads_E: np.ndarray, config: SimulationConfig) -> None:
        hosts = make_hosts(config.hosts, config)
        demand = make_one_each(experts, mean_loads_E)
        plan = plan_placement(demand, hosts, None, expert_bytes=config.expert_bytes).plan
        self.config = config
        self.routes = Routes(plan, experts, sorted(hosts))
        self.backlogs_H = np.zeros(len(hosts))

    def step(self, tokens_E: np.ndarray, now_s: float, histogram: LatencyHistogram) -> WindowOutcome:
        """Serve a window; there is nothing to decide."""
        arrivals_H = self.routes.arrivals(tokens_E)
        served = serve_window(arrivals_H, self.backlogs_H, self.config.experts.interval_s, self.config)
        self.backlogs_H = served.backlogs
        histogram.add(served.latencies_s, arrivals_H)
        return WindowOutcome(
            num_hosts=self.routes.num_hosts,
            num_replicas=self.routes.num_replicas,
            highest_utilization=float(served.utilizations.max()),
        )


class WholeModelSystem:
    """Replicas of the whole model, each on as few hosts as hold it, that share the traffic evenly."""

    name = "whole-model replicas"

    def __init__(
        self,
        experts: tuple[LogicalExpert, ...],
        mean_loads_E: np.ndarray,
        first_loads_E: np.ndarray,
        config: SimulationConfig,
    ) -> None:
        hosts = make_hosts(math.ceil(len(experts) / config.experts_per_host), config)
        plan = plan_placement(make_one_each(experts, mean_loads_E), hosts, None, expert_bytes=config.expert_bytes).plan
        self.config = config
        self.routes = Routes(plan, experts, sorted(hosts))
        self.pool = ExpertHostsConfig(count=1, max_count=_UNBOUNDED)
        self.utilization = float(self.routes.arrivals(first_loads_E).max()) / config.tokens_per_host_s
        first = HostPoolObservation(utilizations=(self.utilization,))
        self.num_copies = compute_hosts_wanted(first, self.pool, config.experts, current=0)
        self.utilization /= self.num_copies
        self.pool_state = HostPoolState(num_hosts=self.num_copies)
        self.starting: list[float] = []
        # Of all copies together, by host within a copy.
        self.backlogs_H = np.zeros(len(hosts))

    def step(self, tokens_E: np.ndarray, now_s: float, histogram: LatencyHistogram) -> WindowOutcome:
        """Serve a window, then decide on the number of copies; a new one comes when all its experts are loaded."""
        scaling, copies = self.config.experts, self.num_copies
        arrivals_H = self.routes.arrivals(tokens_E) / copies
        served = serve_window(arrivals_H, self.backlogs_H / copies, scaling.interval_s, self.config)
        self.backlogs_H = served.backlogs * copies
        histogram.add(served.latencies_s, arrivals_H * copies)
        num_paid = copies + len(self.starting)
        keep = 0.5 ** (scaling.interval_s / scaling.look_back_s)
        self.utilization += (1 - keep) * (float(served.utilizations.max()) - self.utilization)
        before = self.pool_state.num_hosts
        observation = HostPoolObservation(utilizations=(self.utilization,) * copies)
        self.pool_state, wanted = decide_hosts(self.pool_state, observation, self.pool, scaling, now_s)
        ready_s = now_s + self.config.host_start_s + self.config.experts_per_host * self.config.load_s
        self.starting = self.starting[: max(0, wanted - copies)] + [ready_s] * max(0, wanted - before)
        num_ready = sum(time_s <= now_s for time_s in self.starting)
        self.starting = self.starting[num_ready:]
        self.num_copies = min(copies, wanted) + num_ready
        return WindowOutcome(
            num_hosts=num_paid * self.routes.num_hosts,
            num_replicas=num_paid * self.routes.num_replicas,
            num_loads=max(0, wanted - before) * self.routes.num_replicas,
            highest_utilization=float(served.utilizations.max()),
        )
