"""Our placement beside DeepSeek's published rule: the same loads, replicas of each expert, hosts and slots.

The rule decides from nothing but loads, again and again; ours starts from what lies where. Both are given the replicas
that the rule wants. Hosts have as many slots as the rule fills, so ours has no room to spare either.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dsmoe_ray.serving.demand import ExpertDemand
from dsmoe_ray.serving.eplb import plan_eplb
from dsmoe_ray.serving.placement import plan_placement
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan


@dataclass(frozen=True, kw_only=True)
class BalanceComparison:
    """Both placements over a sequence of loads. Loads of experts onto hosts count from the second step on."""

    eplb_max_over_mean: tuple[float, ...]
    """Load of the busiest host over the mean, after each step."""
    max_over_mean: tuple[float, ...]
    eplb_num_loads: int
    """Replicas on hosts that did not hold them before."""
    num_loads: int

    @property
    def worst_ratio(self) -> float:
        """Return the highest max/mean of ours over that of the rule."""
        return max(ours / theirs for ours, theirs in zip(self.max_over_mean, self.eplb_max_over_mean, strict=True))

    @property
    def moved_ratio(self) -> float:
        """Return the loads of ours over those of the rule; experts are of one size, so bytes are the same."""
        return self.num_loads / self.eplb_num_loads if self.eplb_num_loads else 0.0


def compare_with_eplb(
    experts: tuple[LogicalExpert, ...], loads: Iterable[np.ndarray], *, num_hosts: int, slots_per_host: int
) -> BalanceComparison:
    """Place the same loads, one after another, by both; all experts are packed as one layer."""
    hosts = {
        name: HostInfo(host_id=name, addresses=(), node_id=name, memory_bytes=slots_per_host)
        for name in (f"host-{number:05d}" for number in range(num_hosts))
    }
    current: PlacementPlan | None = None
    held: set[tuple[int, int]] | None = None
    eplb_ratios, ratios = [], []
    eplb_num_loads = num_loads = 0
    for loads_E in loads:
        eplb = plan_eplb(loads_E[None], num_slots=num_hosts * slots_per_host, num_hosts=num_hosts)
        counts_E, expert_R, host_R = eplb.counts_LE[0], eplb.expert_ids_LR[0], eplb.hosts_LR[0]
        loads_H = np.bincount(host_R, weights=(loads_E / counts_E)[expert_R], minlength=num_hosts)
        eplb_ratios.append(float(loads_H.max() / loads_H.mean()))
        demand = ExpertDemand(
            experts=experts, replicas_E=counts_E, loads_E=loads_E, load_errors_E=np.zeros(len(experts))
        )
        placement = plan_placement(demand, hosts, current, expert_bytes=1)
        ratios.append(placement.max_over_mean)
        now_held = set(zip(expert_R.tolist(), host_R.tolist(), strict=True))
        if held is not None:
            eplb_num_loads += len(now_held - held)
            num_loads += placement.num_loads
        held, current = now_held, placement.plan
    return BalanceComparison(
        eplb_max_over_mean=tuple(eplb_ratios),
        max_over_mean=tuple(ratios),
        eplb_num_loads=eplb_num_loads,
        num_loads=num_loads,
    )


def choose_slots(num_experts: int, num_hosts: int) -> int:
    """Return slots of a host so that a quarter more replicas than experts fit."""
    return math.ceil(1.25 * num_experts / num_hosts)
