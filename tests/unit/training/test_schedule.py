"""Learning rate and training routing as functions of the step."""

import math
from itertools import pairwise

import pytest

from dsmoe_ray.model.config import RoutingMode
from dsmoe_ray.training.config import TrainConfig
from dsmoe_ray.training.schedule import compute_lr, compute_training_routing

PEAK = 0.5


def train_config(**changes) -> TrainConfig:
    values = {"steps": 100, "seq_len": 16, "num_tokens_per_step": 64, "lr": PEAK}
    return TrainConfig.model_validate(values | changes)


def rates(**lr_schedule) -> list[float]:
    config = train_config(lr_schedule=lr_schedule)
    return [compute_lr(step, config) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", [{"kind": "cosine"}, {"kind": "wsd", "decay_steps": 20}], ids=["cosine", "wsd"])
def test_warm_up_rises_in_equal_parts_to_the_peak(schedule):
    found = rates(warmup_steps=10, **schedule)
    # The first step learns already, and the last of the warm-up is at the peak.
    assert found[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(PEAK)


@pytest.mark.parametrize(
    "schedule",
    [{"kind": "cosine"}, {"kind": "wsd", "decay_steps": 20}, {"kind": "wsd", "decay_steps": 100}],
    ids=["cosine", "wsd", "wsd without plateau"],
)
@pytest.mark.parametrize("warmup_steps", [0, 1, 10])
def test_after_the_warm_up_the_rate_never_rises_and_stays_above_its_floor(schedule, warmup_steps):
    found = rates(warmup_steps=warmup_steps, min_ratio=0.2, **schedule)[warmup_steps:]
    assert all(later <= earlier for earlier, later in pairwise(found))
    assert 0.2 * PEAK < found[-1] < 0.25 * PEAK


def test_cosine_is_halfway_down_halfway_through_and_ends_at_its_floor():
    config = train_config(lr_schedule={"warmup_steps": 20, "min_ratio": 0.1})
    assert compute_lr(60, config) == pytest.approx(0.5 * (1.0 + 0.1) * PEAK)
    assert compute_lr(40, config) == pytest.approx(PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert compute_lr(100, config) == pytest.approx(0.1 * PEAK)


def test_wsd_holds_the_peak_and_falls_linearly_at_the_end():
    found = rates(kind="wsd", decay_steps=20, warmup_steps=10, min_ratio=0.1)
    assert found[10:81] == [PEAK] * 71
    assert found[90] == pytest.approx(PEAK * (1 - 0.9 * 0.5))
    assert compute_lr(100, train_config(lr_schedule={"kind": "wsd", "decay_steps": 20})) == pytest.approx(0.1 * PEAK)


def test_beyond_its_last_step_a_run_stays_at_the_floor():
    for schedule in ({"kind": "cosine"}, {"kind": "wsd", "decay_steps": 20}):
        assert compute_lr(1000, train_config(lr_schedule=schedule)) == pytest.approx(0.1 * PEAK)


def test_a_warm_up_as_long_as_the_run_divides_by_nothing():
    assert rates(warmup_steps=100)[-1] == pytest.approx(PEAK)
    assert compute_lr(100, train_config(lr_schedule={"warmup_steps": 100})) > 0


@pytest.fixture
def model(tiny_config):
    return tiny_config("model.num_layers=3", "model.ffn.num_experts=16").model


def ffn_experts(step, model, *, seed=0, **routing) -> list[int]:
    """Return how many FFN experts each layer keeps in a step."""
    rules = compute_training_routing(step, train_config(routing_ffn=routing), model, seed=seed)
    assert all(rule.attention.mode is RoutingMode.DENSE for rule in rules)
    return [16 if rule.ffn.mode is RoutingMode.DENSE else rule.ffn.top_k for rule in rules]


def test_dense_and_top_k_are_the_same_in_every_layer_and_step(model):
    for step in (0, 7, 99):
        assert ffn_experts(step, model, mode="dense") == [16] * 3
        assert ffn_experts(step, model, mode="top_k", top_k=5) == [5] * 3


def test_a_random_k_takes_every_value_from_its_least_to_all(model):
    drawn = [ffn_experts(step, model, mode="random_k", top_k=4) for step in range(300)]
    assert {k for layers in drawn for k in layers} == set(range(4, 17))
    # 900 even draws from 13 values: a mean of 10, with a deviation of 0.125.
    assert sum(map(sum, drawn)) / 900 == pytest.approx(10, abs=0.6)


def test_a_random_k_depends_on_seed_step_and_layer_alone(model):
    def draw(step, seed=0):
        return ffn_experts(step, model, seed=seed, mode="random_k", top_k=1)

    assert [draw(step) for step in range(20)] == [draw(step) for step in range(20)]
    assert len({tuple(draw(step)) for step in range(20)}) > 15, "steps draw alike"
    assert any(len(set(draw(step))) > 1 for step in range(20)), "layers draw alike"
    assert [draw(step) for step in range(20)] != [draw(step, seed=1) for step in range(20)]


def test_attention_and_ffn_draw_apart(tiny_config):
    model = tiny_config("model.attention.num_experts=16", "model.ffn.num_experts=16").model
    routing = {"mode": "random_k", "top_k": 1}
    config = train_config(routing_ffn=routing, routing_attention=routing)
    pairs = [rule for step in range(10) for rule in compute_training_routing(step, config, model, seed=0)]
    assert any(rule.attention != rule.ffn for rule in pairs)


def test_annealing_goes_from_all_experts_to_k_and_stays(model):
    routing = {"mode": "anneal", "top_k": 4, "start_step": 10, "end_step": 50}
    kept = [ffn_experts(step, model, **routing)[0] for step in range(100)]
    assert kept[:11] == [16] * 11
    assert kept[50:] == [4] * 50
    assert all(0 <= earlier - later <= 1 for earlier, later in pairwise(kept))
    assert kept[30] == 10


def test_models_without_mixtures_train_densely(tiny_config):
    model = tiny_config(
        "model.attention={kind: gqa, num_heads: 4, num_kv_heads: 2, head_dim: 8}", "model.ffn={kind: dense, d_ff: 64}"
    ).model
    rules = compute_training_routing(3, train_config(), model, seed=0)
    assert [(rule.attention.mode, rule.ffn.mode) for rule in rules] == [(RoutingMode.DENSE, RoutingMode.DENSE)] * 2
