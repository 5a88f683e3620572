"""Replicas and hosts wanted, from what was measured. Pure: a state and an observation in, a state and a decision out.

An expert's load is a moving average of the tokens that wanted it. Its replicas are as many as keep each one's share
of a host at the target utilization. Delays mean what they mean in Ray Serve: a change is made once it was wanted
without a break for ``upscale_delay_s`` or ``downscale_delay_s``, in the extent wanted then; the way to zero leads over
one; from zero the first token brings an expert back at once. Between what would add a replica and what would take it
away again lies ``downscale_margin_ratio``, so that a load at the border changes nothing.

Shape letter: E logical experts of the model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.config import ExpertHostsConfig, ExpertScalingConfig
from dsmoe_ray.serving.demand import ExpertDemand
from dsmoe_ray.serving.plan import LogicalExpert

# Sums of floats drift: a delay of 0.3 s has passed after three intervals of 0.1 s.
_DELAY_TOLERANCE_S = 1e-6
_ROUNDING = 1e-9
# Fewer tokens than this within a half-life are the fading memory of a token, not a load.
_IDLE_TOKENS = 0.5
_LEAST_BUSY_EXPERTS = 8
_MEDIAN_OF_SQUARED_NORMAL = 0.4549
# Speed of a host changes slowly, and is measured only while there is work.
_CAPACITY_HALF_LIFE_S = 10.0


@dataclass(frozen=True, kw_only=True)
class LoadObservation:
    """What all hosts and routers reported since the last observation."""

    num_tokens_E: np.ndarray
    """Tokens that wanted each expert."""
    busy_s: float = 0.0
    """Seconds that hosts spent computing these tokens, summed over hosts."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Since when, and in which direction, each count should change. Arrays of one length, never written to."""

    directions: np.ndarray
    """1 up, -1 down, 0 neither."""
    since_s: np.ndarray
    """Meaningless where the direction is 0."""


@dataclass(frozen=True, kw_only=True)
class AutoscalingState:
    """Everything that a decision needs from the past."""

    experts: tuple[LogicalExpert, ...]
    replicas_E: np.ndarray
    """Replicas decided last."""
    loads_E: np.ndarray
    waiting: Waiting
    observed_at_s: float | None = None
    dispersion: float = 1.0
    """Variance over mean of the tokens of an interval: 1 where they come independently, more where in bursts."""
    tokens: float = 0.0
    """With ``busy_s`` the fading sums that give a host's speed."""
    busy_s: float = 0.0


def start_autoscaling(
    experts: Sequence[LogicalExpert],
    config: ExpertScalingConfig,
    *,
    replicas: Mapping[LogicalExpert, int] | None = None,
) -> AutoscalingState:
    """Return the state before the first observation.

    Args:
        experts: All experts of the model.
        config: Gives the number of replicas where ``replicas`` does not.
        replicas: Replicas that exist already, as a controller finds them that was started anew.

    Raises:
        ConfigError: a pinned expert is none of this model.
    """
    _pinned(tuple(experts), config)
    held = replicas or {}
    counts = [held.get(expert, config.min_replicas) for expert in experts]
    zeros_E = np.zeros(len(counts))
    return AutoscalingState(
        experts=tuple(experts),
        replicas_E=np.array(counts, dtype=np.int64),
        loads_E=zeros_E,
        waiting=_no_waiting(len(counts)),
    )


def decide(
    state: AutoscalingState, observation: LoadObservation, config: ExpertScalingConfig, now_s: float
) -> tuple[AutoscalingState, ExpertDemand]:
    """Return how many replicas of each expert there should be from now on.

    The first observation only starts the clock: nobody knows how long its tokens took to arrive.

    Raises:
        ValueError: time did not go on since the last observation, or it is of another number of experts.
    """
    num_tokens_E = np.asarray(observation.num_tokens_E, dtype=np.float64)
    if num_tokens_E.shape != state.loads_E.shape:
        raise ValueError(f"expected the tokens of {len(state.experts)} experts, found shape {num_tokens_E.shape}")
    state, errors_E = _average(state, num_tokens_E, observation.busy_s, config, now_s)
    replica_load = _replica_load(state, config)
    wanted_E = _wanted(state, num_tokens_E, config, replica_load)
    waiting, replicas_E = _apply_delays(state.waiting, state.replicas_E, wanted_E, config, now_s)
    for position, count in _pinned(state.experts, config).items():
        replicas_E[position] = count
    state = replace(state, replicas_E=replicas_E, waiting=waiting)
    demand = ExpertDemand(
        experts=state.experts,
        replicas_E=replicas_E,
        loads_E=state.loads_E,
        load_errors_E=errors_E,
        replica_load=replica_load,
    )
    return state, demand


def _average(
    state: AutoscalingState, num_tokens_E: np.ndarray, busy_s: float, config: ExpertScalingConfig, now_s: float
) -> tuple[AutoscalingState, np.ndarray]:
    """Return the state with this interval in its averages, and the standard errors of the loads."""
    if state.observed_at_s is None:
        return replace(state, observed_at_s=now_s), np.zeros_like(state.loads_E)
    duration_s = now_s - state.observed_at_s
    if duration_s <= 0:
        raise ValueError(f"time must go on between observations; found {state.observed_at_s} s, then {now_s} s")
    keep = 0.5 ** (duration_s / config.look_back_s)
    difference_E = num_tokens_E / duration_s - state.loads_E
    dispersion = keep * state.dispersion + (1 - keep) * _measure_dispersion(state.loads_E, difference_E, duration_s)
    keep_capacity = 0.5 ** (duration_s / _CAPACITY_HALF_LIFE_S) if busy_s > 0 else 1.0
    averaged = replace(
        state,
        observed_at_s=now_s,
        loads_E=state.loads_E + (1 - keep) * difference_E,
        dispersion=dispersion,
        tokens=keep_capacity * state.tokens + (float(num_tokens_E.sum()) if busy_s > 0 else 0.0),
        busy_s=keep_capacity * state.busy_s + busy_s,
    )
    # The variance of a moving average is (1 - keep) / (1 + keep) of that of its terms.
    return averaged, np.sqrt(dispersion * averaged.loads_E / duration_s * (1 - keep) / (1 + keep))


def _measure_dispersion(loads_E: np.ndarray, difference_E: np.ndarray, duration_s: float) -> float:
    """Return the variance over the mean of this interval's tokens, at least 1.

    The median over experts, so that those whose load has just changed do not pass for chance.
    """
    is_busy = loads_E * duration_s >= 1
    if is_busy.sum() < _LEAST_BUSY_EXPERTS:
        return 1.0
    ratios = difference_E[is_busy] ** 2 * duration_s / loads_E[is_busy]
    return max(1.0, float(np.median(ratios)) / _MEDIAN_OF_SQUARED_NORMAL)


def _replica_load(state: AutoscalingState, config: ExpertScalingConfig) -> float | None:
    if config.tokens_per_replica_s is not None:
        return config.target_utilization * config.tokens_per_replica_s
    if state.busy_s <= 0 or state.tokens <= 0:
        return None
    return config.target_utilization * state.tokens / state.busy_s


def _wanted(
    state: AutoscalingState, num_tokens_E: np.ndarray, config: ExpertScalingConfig, replica_load: float | None
) -> np.ndarray:
    """Return the replicas that the loads alone would have, before any delay."""
    wanted_E = state.replicas_E
    if replica_load is not None:
        wanted_E = _with_margin(state.loads_E / replica_load, state.replicas_E, config.downscale_margin_ratio)
    awake_E = (num_tokens_E > 0) | (state.loads_E * config.look_back_s >= _IDLE_TOKENS)
    least_E = np.maximum(config.min_replicas, awake_E.astype(np.int64))
    most_E = np.where(awake_E, config.max_replicas, config.min_replicas)
    return np.clip(wanted_E, least_E, most_E)


def _with_margin(exact: np.ndarray, current: np.ndarray, margin_ratio: float) -> np.ndarray:
    """Round up; but stay where fewer would be full to more than 1 - margin_ratio of the target."""
    up = np.ceil(exact - _ROUNDING).astype(np.int64)
    down = np.ceil(exact / (1 - margin_ratio) - _ROUNDING).astype(np.int64)
    return np.where(up > current, up, np.minimum(current, down))


def _apply_delays(
    waiting: Waiting, current: np.ndarray, wanted: np.ndarray, config: ExpertScalingConfig, now_s: float
) -> tuple[Waiting, np.ndarray]:
    """Return who still waits, and the counts after every change that has waited long enough."""
    directions = np.sign(wanted - current).astype(np.int8)
    since_s = np.where(directions == waiting.directions, waiting.since_s, now_s)
    delays_s = np.where(directions > 0, config.upscale_delay_s, config.downscale_delay_s)
    is_due = (directions != 0) & (now_s - since_s + _DELAY_TOLERANCE_S >= delays_s)
    is_due |= (directions > 0) & (current == 0)
    # Only from one replica to zero, each step after its own delay.
    reached = np.where((directions < 0) & (current > 1), np.maximum(wanted, 1), wanted)
    counts = np.where(is_due, reached, current)
    return Waiting(directions=np.where(is_due, 0, directions).astype(np.int8), since_s=since_s), counts


def _no_waiting(num: int) -> Waiting:
    return Waiting(directions=np.zeros(num, dtype=np.int8), since_s=np.zeros(num))


def _pinned(experts: tuple[LogicalExpert, ...], config: ExpertScalingConfig) -> dict[int, int]:
    """Return the pinned counts by position."""
    if not config.pinned:
        return {}
    positions = {f"{expert.layer}/{expert.expert_id}": position for position, expert in enumerate(experts)}
    for name in config.pinned:
        if name not in positions:
            raise ConfigError(
                f"experts.pinned: {name!r} is no expert of this model. Write layer/expert, from 0/0 to "
                f"{experts[-1].layer}/{experts[-1].expert_id}."
            )
    return {positions[name]: count for name, count in config.pinned.items()}


@dataclass(frozen=True, kw_only=True)
class HostPoolState:
    """What a decision about the number of hosts needs from the past."""

    num_hosts: int
    """Hosts decided last."""
    waiting: Waiting = Waiting(directions=np.zeros(1, dtype=np.int8), since_s=np.zeros(1))


@dataclass(frozen=True, kw_only=True)
class HostPoolObservation:
    """What hosts reported of themselves."""

    utilizations: tuple[float, ...]
    """Share of time that each host computes, averaged; above 1 where work piles up."""
    needed_bytes: int = 0
    """What one replica of every expert takes that has to stay in memory."""
    host_memory_bytes: int | None = None


def decide_hosts(
    state: HostPoolState,
    observation: HostPoolObservation,
    hosts: ExpertHostsConfig,
    scaling: ExpertScalingConfig,
    now_s: float,
) -> tuple[HostPoolState, int]:
    """Return how many hosts there should be from now on, after the same delays as for replicas."""
    wanted = compute_hosts_wanted(observation, hosts, scaling, current=state.num_hosts)
    waiting, counts = _apply_delays(state.waiting, np.array([state.num_hosts]), np.array([wanted]), scaling, now_s)
    return HostPoolState(num_hosts=int(counts[0]), waiting=waiting), int(counts[0])


def compute_hosts_wanted(
    observation: HostPoolObservation, hosts: ExpertHostsConfig, scaling: ExpertScalingConfig, *, current: int
) -> int:
    """Return the number of hosts that would work at the target utilization, without any delay.

    This is what a policy of Ray Serve returns: Serve applies the delays of its own configuration to it.
    """
    exact = np.array([sum(observation.utilizations) / scaling.target_utilization])
    wanted = int(_with_margin(exact, np.array([current]), scaling.downscale_margin_ratio)[0])
    if observation.host_memory_bytes:
        wanted = max(wanted, math.ceil(observation.needed_bytes / observation.host_memory_bytes))
    return max(hosts.count, min(wanted, hosts.max_count or hosts.count))
