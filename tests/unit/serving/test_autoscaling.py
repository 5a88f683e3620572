"""Replicas and hosts wanted: delays, hysteresis, pins, and the way to zero and back."""

import numpy as np
import pytest

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.autoscaling import (
    HostPoolObservation,
    HostPoolState,
    LoadObservation,
    compute_hosts_wanted,
    decide,
    decide_hosts,
    start_autoscaling,
)
from dsmoe_ray.serving.config import ExpertHostsConfig, ExpertScalingConfig
from dsmoe_ray.serving.demand import index_experts

STEP_S = 0.25


def make_config(**changes) -> ExpertScalingConfig:
    values = {
        "tokens_per_replica_s": 100.0,
        "target_utilization": 0.5,
        "look_back_s": 0.5,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 3.0,
        "max_replicas": 4,
    }
    return ExpertScalingConfig(**(values | changes))


class Loop:
    """Feeds constant rates to the autoscaler and keeps what it decided."""

    def __init__(self, config: ExpertScalingConfig, num_experts: int = 2):
        self.config = config
        self.state = start_autoscaling(index_experts(1, num_experts), config)
        self.now_s = 0.0
        self.history: list[list[int]] = []
        self.run([0.0] * num_experts, STEP_S)

    def run(self, rates, duration_s, *, busy_s_per_s=0.0):
        for _ in range(round(duration_s / STEP_S)):
            self.now_s += STEP_S
            observation = LoadObservation(num_tokens_E=np.array(rates) * STEP_S, busy_s=busy_s_per_s * STEP_S)
            self.state, self.demand = decide(self.state, observation, self.config, self.now_s)
            self.history.append(self.demand.replicas_E.tolist())
        return self.history[-1]

    def seconds_until(self, rates, wanted, limit_s=60.0):
        start_s = self.now_s
        while self.history[-1] != wanted:
            assert self.now_s - start_s < limit_s, self.history[-1]
            self.run(rates, STEP_S)
        return self.now_s - start_s


def test_load_adds_replicas_of_that_expert_only_and_after_the_delay():
    loop = Loop(make_config())
    # The average passes 50 after 0.3 s, and a second later it asks for three at once.
    assert 1.25 <= loop.seconds_until([140.0, 5.0], [3, 1]) <= 1.75
    assert loop.run([140.0, 5.0], 5) == [3, 1]


def test_replicas_go_after_the_downscale_delay_and_not_before():
    loop = Loop(make_config())
    loop.run([140.0, 5.0], 5)
    assert loop.run([5.0, 5.0], 3.0) == [3, 1]
    assert loop.run([5.0, 5.0], 2.0) == [1, 1]


def test_a_load_around_the_border_changes_nothing_after_the_first_step():
    loop = Loop(make_config(look_back_s=0.1, upscale_delay_s=0.0, downscale_delay_s=0.0))
    for rate in (52.0, 47.0) * 20:
        loop.run([rate, 0.0], STEP_S)
    counts = [counts[0] for counts in loop.history]
    assert counts == sorted(counts)
    assert counts[-1] == 2


def test_an_interrupted_wish_waits_anew():
    loop = Loop(make_config(look_back_s=0.01))
    for _ in range(10):
        loop.run([90.0, 0.0], 0.75)
        loop.run([10.0, 0.0], 0.25)
    assert {tuple(counts) for counts in loop.history} == {(1, 1)}


def test_an_idle_expert_goes_to_zero_over_one_and_its_first_token_brings_it_back_at_once():
    loop = Loop(make_config(min_replicas=0))
    assert loop.history[-1] == [0, 0]
    assert loop.run([4.0, 0.0], STEP_S) == [1, 0]
    loop.run([140.0, 0.0], 5)
    assert loop.history[-1] == [3, 0]
    went_s = loop.seconds_until([0.0, 0.0], [0, 0])
    counts = [counts[0] for counts in loop.history]
    assert counts[-int(3.0 / STEP_S) - 1 : -1] == [1] * int(3.0 / STEP_S)
    assert 6.0 <= went_s <= 12.0


def test_a_pinned_expert_keeps_its_replicas_whatever_its_load():
    loop = Loop(make_config(pinned={"0/1": 3}))
    assert loop.run([140.0, 0.0], 5) == [3, 3]
    assert loop.run([140.0, 1e6], 5) == [3, 3]


def test_a_pin_on_an_expert_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match="0/7"):
        Loop(make_config(pinned={"0/7": 1}))


def test_without_a_set_speed_it_is_measured_from_compute_time():
    loop = Loop(make_config(tokens_per_replica_s=None))
    # 200 tokens/s keep 0.8 hosts busy: 250 tokens/s of a host, 125 at the target.
    assert loop.run([150.0, 50.0], 10, busy_s_per_s=0.8) == [2, 1]
    assert loop.demand.replica_load == pytest.approx(125.0)


def test_more_load_never_means_fewer_replicas():
    config = make_config()
    loop = Loop(config, num_experts=50)
    rng = np.random.default_rng(0)
    loop.run(rng.uniform(0, 200, 50), 2)
    tokens_E = rng.uniform(0, 1000, 50)
    extra_E = rng.uniform(0, 500, 50)
    _, less = decide(loop.state, LoadObservation(num_tokens_E=tokens_E), config, loop.now_s + 5)
    _, more = decide(loop.state, LoadObservation(num_tokens_E=tokens_E + extra_E), config, loop.now_s + 5)
    assert (more.replicas_E >= less.replicas_E).all()
    assert (more.replicas_E > less.replicas_E).any()


def test_time_that_does_not_go_on_is_refused():
    loop = Loop(make_config())
    with pytest.raises(ValueError, match="time must go on"):
        decide(loop.state, LoadObservation(num_tokens_E=np.zeros(2)), loop.config, loop.now_s)


def test_hosts_follow_their_utilization_after_the_delays_within_their_limits():
    config, pool = make_config(), ExpertHostsConfig(count=2, max_count=6)
    busy = HostPoolObservation(utilizations=(0.9, 0.9))
    state, now = decide_hosts(HostPoolState(num_hosts=2), busy, pool, config, 0.0)
    assert now == 2
    state, now = decide_hosts(state, busy, pool, config, 1.0)
    assert now == 4
    idle = HostPoolObservation(utilizations=(0.1, 0.1, 0.0, 0.0))
    state, now = decide_hosts(state, idle, pool, config, 1.5)
    assert decide_hosts(state, idle, pool, config, 4.0)[1] == 4
    assert decide_hosts(state, idle, pool, config, 4.5)[1] == 2
    flood = HostPoolObservation(utilizations=(2.0,) * 4)
    assert compute_hosts_wanted(flood, pool, config, current=4) == 6
    held = HostPoolObservation(utilizations=(0.1,) * 4, needed_bytes=50, host_memory_bytes=10)
    assert compute_hosts_wanted(held, pool, config, current=4) == 5
