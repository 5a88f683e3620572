"""A trace through all systems, window by window, and what came of it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dsmoe_ray import clock
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.placement import PlacementEvent
from dsmoe_ray.serving.simulation.baselines import FixedSystem, WholeModelSystem
from dsmoe_ray.serving.simulation.cluster import System, TimeTaken, WindowOutcome
from dsmoe_ray.serving.simulation.config import SimulationConfig
from dsmoe_ray.serving.simulation.eplb_comparison import BalanceComparison, choose_slots, compare_with_eplb
from dsmoe_ray.serving.simulation.queueing import LatencyHistogram
from dsmoe_ray.serving.simulation.scaling import ScalingSystem
from dsmoe_ray.serving.simulation.traces import Trace

# Times at which the balance is compared with that of the published rule.
_NUM_BALANCE_STEPS = 8

OnWindow = Callable[[float, tuple[PlacementEvent, ...]], None]
"""Told of each window's end and of the events of its decisions."""


@dataclass
class SystemTotals:
    """What one system used and reached after the warm-up."""

    histogram: LatencyHistogram = field(default_factory=LatencyHistogram)
    host_s: float = 0.0
    replica_s: float = 0.0
    num_loads: int = 0
    num_cold_tokens: float = 0.0
    most_hosts: float = 0.0
    overloaded_s: float = 0.0
    """Time in which more arrived at some host than it can compute."""

    def add(self, outcome: WindowOutcome, window_s: float) -> None:
        """Count one window."""
        self.host_s += outcome.num_hosts * window_s
        self.replica_s += outcome.num_replicas * window_s
        self.num_loads += outcome.num_loads
        self.num_cold_tokens += outcome.num_cold_tokens
        self.most_hosts = max(self.most_hosts, outcome.num_hosts)
        self.overloaded_s += window_s * (outcome.highest_utilization > 1)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of a trace."""

    num_experts: int
    simulated_s: float
    """Warm-up included."""
    wall_s: float
    cpu_s: float
    systems: dict[str, SystemTotals]
    decisions: tuple[TimeTaken, ...]
    """What each window's decisions took."""
    first_plan: TimeTaken
    num_events: int
    balance: BalanceComparison
    balance_slots: int


def replay(trace: Trace, config: SimulationConfig, *, on_window: OnWindow | None = None) -> Replay:
    """Run a trace through our scaling and both baselines.

    Raises:
        ConfigError: the hosts cannot hold every expert once, or the trace ends within the warm-up.
    """
    _check(trace, config)
    began_s, began_cpu_s = clock.monotonic_s(), clock.cpu_s()
    ours, whole, fixed = _build_systems(trace, config)
    systems: list[System] = [ours, whole, fixed]
    totals = {system.name: SystemTotals() for system in systems}
    unreported = LatencyHistogram()
    decisions, num_events, now_s = [], 0, 0.0
    for tokens_E in trace.windows(config.experts.interval_s):
        now_s += config.experts.interval_s
        is_reported = now_s > config.warm_up_s
        for system in systems:
            total = totals[system.name]
            outcome = system.step(tokens_E, now_s, total.histogram if is_reported else unreported)
            if is_reported:
                total.add(outcome, config.experts.interval_s)
            if outcome.decision:
                decisions.append(outcome.decision)
                num_events += len(outcome.events)
                if on_window:
                    on_window(now_s, outcome.events)
    slots = choose_slots(len(trace.experts), config.hosts)
    return Replay(
        num_experts=len(trace.experts),
        simulated_s=now_s,
        wall_s=clock.monotonic_s() - began_s,
        cpu_s=clock.cpu_s() - began_cpu_s,
        systems=totals,
        decisions=tuple(decisions),
        first_plan=ours.first_plan,
        num_events=num_events,
        balance=_compare_balance(trace, config.hosts, slots),
        balance_slots=slots,
    )


def _check(trace: Trace, config: SimulationConfig) -> None:
    if len(trace.experts) > config.hosts * config.experts_per_host:
        raise ConfigError(
            f"{config.hosts} hosts of {config.experts_per_host} experts each cannot hold the trace's "
            f"{len(trace.experts)} experts. Raise hosts or experts_per_host."
        )
    if trace.duration_s <= config.warm_up_s:
        raise ConfigError(
            f"the trace lasts {trace.duration_s:g} s and all of it would be warm-up ({config.warm_up_s:g} s). Lower "
            "warm_up_s, or give a longer trace."
        )


def _build_systems(trace: Trace, config: SimulationConfig) -> tuple[ScalingSystem, WholeModelSystem, FixedSystem]:
    mean_E = trace.mean_loads(0.0, trace.duration_s)
    first_E = trace.mean_loads(0.0, min(trace.duration_s, max(1.0, 4 * config.experts.interval_s)))
    return (
        ScalingSystem(trace.experts, first_E, config),
        WholeModelSystem(trace.experts, mean_E, first_E, config),
        FixedSystem(trace.experts, mean_E, config),
    )


def _compare_balance(trace: Trace, num_hosts: int, slots: int) -> BalanceComparison:
    edges_s = np.linspace(0.0, trace.duration_s, _NUM_BALANCE_STEPS + 1).tolist()
    loads = [trace.mean_loads(start_s, end_s) for start_s, end_s in itertools.pairwise(edges_s)]
    busy = [loads_E for loads_E in loads if loads_E.sum() > 0]
    return compare_with_eplb(trace.experts, busy, num_hosts=num_hosts, slots_per_host=slots)
