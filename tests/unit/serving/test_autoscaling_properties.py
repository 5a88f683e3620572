"""What holds for every decision about replicas, whatever the loads and the past."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.serving.autoscaling import LoadObservation, decide, start_autoscaling
from dsmoe_ray.serving.config import ExpertScalingConfig
from dsmoe_ray.serving.demand import index_experts

NUM_EXPERTS = 4
EXPERTS = index_experts(1, NUM_EXPERTS)
STEP_S = 0.25

tokens = st.lists(st.integers(0, 400), min_size=NUM_EXPERTS, max_size=NUM_EXPERTS)
pasts = st.lists(tokens, max_size=30)
configs = st.builds(
    ExpertScalingConfig,
    min_replicas=st.integers(0, 2),
    max_replicas=st.integers(2, 6),
    upscale_delay_s=st.sampled_from([0.0, 0.5]),
    downscale_delay_s=st.sampled_from([0.0, 1.0]),
    downscale_margin_ratio=st.sampled_from([0.0, 0.1, 0.5]),
    look_back_s=st.sampled_from([0.1, 1.0]),
    tokens_per_replica_s=st.just(200.0),
    pinned=st.dictionaries(st.sampled_from(["0/1", "0/3"]), st.integers(0, 8)),
)


def observe(values) -> LoadObservation:
    return LoadObservation(num_tokens_E=np.array(values, dtype=np.float64))


def live(config, past):
    """Return the state after a past, when it ended, and the replicas on the way."""
    state, now_s, history = start_autoscaling(EXPERTS, config), 0.0, []
    for values in past:
        now_s += STEP_S
        state, demand = decide(state, observe(values), config, now_s)
        history.append(demand.replicas_E)
    return state, now_s, history


@settings(max_examples=100, deadline=None)
@given(configs, pasts, tokens, tokens)
def test_more_load_never_means_fewer_replicas(config, past, values, extra):
    state, now_s, _ = live(config, past)
    more = [value + addition for value, addition in zip(values, extra, strict=True)]
    _, at_less = decide(state, observe(values), config, now_s + STEP_S)
    _, at_more = decide(state, observe(more), config, now_s + STEP_S)
    assert (at_more.replicas_E >= at_less.replicas_E).all()


@settings(max_examples=100, deadline=None)
@given(configs, pasts)
def test_limits_and_pins_hold_at_any_time(config, past):
    for replicas_E in live(config, past)[2]:
        for expert, count in zip(EXPERTS, replicas_E.tolist(), strict=True):
            pin = config.pinned.get(f"{expert.layer}/{expert.expert_id}")
            if pin is None:
                assert config.min_replicas <= count <= config.max_replicas
            else:
                assert count == pin


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2000), st.lists(st.floats(0.91, 1.0), min_size=1, max_size=60))
def test_a_load_within_the_margin_never_goes_up_and_down(rate, factors):
    config = ExpertScalingConfig(
        max_replicas=100,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_margin_ratio=0.1,
        look_back_s=0.01,
        tokens_per_replica_s=100.0,
    )
    past = [[rate * factor * STEP_S] * NUM_EXPERTS for factor in factors]
    counts = [int(replicas_E[0]) for replicas_E in live(config, past)[2]]
    assert counts == sorted(counts)


@settings(max_examples=50, deadline=None)
@given(configs, pasts)
def test_a_decision_depends_on_its_arguments_alone_and_changes_none(config, past):
    state, now_s, _ = live(config, past)
    before = [state.loads_E.copy(), state.replicas_E.copy(), state.waiting.since_s.copy()]
    first = decide(state, observe([9] * NUM_EXPERTS), config, now_s + STEP_S)
    second = decide(state, observe([9] * NUM_EXPERTS), config, now_s + STEP_S)
    assert (first[1].replicas_E == second[1].replicas_E).all()
    after = [state.loads_E, state.replicas_E, state.waiting.since_s]
    assert all((old == new).all() for old, new in zip(before, after, strict=True))
