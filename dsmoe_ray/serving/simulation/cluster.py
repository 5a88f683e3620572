"""What all simulated systems share: equal hosts, plans as arrays, and what a window of time has cost.

Shape letters: E experts, R replicas.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import numpy as np

from dsmoe_ray import clock
from dsmoe_ray.serving.demand import ExpertDemand
from dsmoe_ray.serving.placement import PlacementEvent
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan
from dsmoe_ray.serving.simulation.config import SimulationConfig
from dsmoe_ray.serving.simulation.queueing import LatencyHistogram


class TimeTaken(NamedTuple):
    """Real time, not simulated time."""

    wall_s: float
    cpu_s: float

    @classmethod
    def start(cls) -> Self:
        """Return the present."""
        return cls(clock.monotonic_s(), clock.cpu_s())

    def until_now(self) -> "TimeTaken":
        """Return what has passed since this start."""
        return TimeTaken(clock.monotonic_s() - self.wall_s, clock.cpu_s() - self.cpu_s)


@dataclass(frozen=True, kw_only=True)
class WindowOutcome:
    """What a system used and reached in one window."""

    num_hosts: float
    num_replicas: float
    num_loads: int = 0
    """Replicas whose loading began."""
    num_cold_tokens: float = 0.0
    """Tokens that waited for their expert to be read from disk."""
    highest_utilization: float = 0.0
    decision: TimeTaken | None = None
    """What the decisions after this window took; None without any."""
    events: tuple[PlacementEvent, ...] = ()


class System(Protocol):
    """One way to serve."""

    name: str

    def step(self, tokens_E: np.ndarray, now_s: float, histogram: LatencyHistogram) -> WindowOutcome:
        """Serve the tokens that arrived in the window before ``now_s``, and decide what comes next."""


def make_hosts(num_hosts: int, config: SimulationConfig) -> dict[str, HostInfo]:
    """Return equal hosts, the same ones for the same numbers."""
    return {
        name: HostInfo(
            host_id=name,
            addresses=(),
            node_id=f"node-{number // config.hosts_per_node:05d}",
            memory_bytes=config.memory_bytes,
        )
        for number in range(num_hosts)
        for name in (f"host-{number:05d}",)
    }


def make_one_each(experts: tuple[LogicalExpert, ...], loads_E: np.ndarray) -> ExpertDemand:
    """Return the demand for one replica of each expert."""
    return ExpertDemand(
        experts=experts,
        replicas_E=np.ones(len(experts), dtype=np.int64),
        loads_E=loads_E,
        load_errors_E=np.zeros(len(experts)),
    )


class Routes:
    """A plan as arrays: which share of each expert's tokens goes to which host."""

    def __init__(self, plan: PlacementPlan, experts: tuple[LogicalExpert, ...], host_ids: list[str]) -> None:
        numbers = {host_id: number for number, host_id in enumerate(host_ids)}
        held = [plan.replicas[expert] for expert in experts]
        counts_E = np.fromiter(map(len, held), dtype=np.int64, count=len(held))
        self.num_hosts = len(host_ids)
        self.expert_R = np.repeat(np.arange(len(experts)), counts_E)
        self.host_R = np.array([numbers[host_id] for host_ids_ in held for host_id in host_ids_], dtype=np.int64)
        self.share_R = 1.0 / np.repeat(counts_E, counts_E)
        self.is_cold_E = np.fromiter((expert in plan.cold for expert in experts), dtype=bool, count=len(experts))
        self.num_replicas = int(counts_E[~self.is_cold_E].sum())

    def arrivals(self, tokens_E: np.ndarray) -> np.ndarray:
        """Return the tokens that go to each host."""
        return np.bincount(self.host_R, weights=tokens_E[self.expert_R] * self.share_R, minlength=self.num_hosts)
