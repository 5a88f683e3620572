"""The search for rules, against a made-up model whose losses are formulas."""

import numpy as np
import pytest

from dsmoe_ray.artifact.calibration_record import LayerProfile
from dsmoe_ray.evaluation.rule_meter import Cost
from dsmoe_ray.evaluation.rule_search import (
    MixtureSize,
    choose_profiled_top_k,
    find_threshold,
    measure_profile,
    plan_table,
    threshold_at,
    to_rule,
)
from dsmoe_ray.model.config import RoutingConfig

SIZE = MixtureSize(num_layers=3, num_experts=16)
WEIGHTS = (1.0, 0.01, 0.1)


class Model:
    """Layer l loses ``weight / k``."""

    def __init__(self, size=SIZE, weights=WEIGHTS):
        self.size, self.weights = size, weights
        self.measured = []

    def loss(self, table):
        whole = 1 / self.size.num_experts
        return 2.0 + sum(weight * (1 / k - whole) for weight, k in zip(self.weights, table, strict=True))

    def measure(self, stage, rules):
        self.measured += rules
        return [self._cost(rule) for rule in rules]

    def _cost(self, rule):
        table = [rule.at_layer(layer).top_k or self.size.num_experts for layer in range(self.size.num_layers)]
        return Cost(self.loss(table), sum(table) / self.size.num_layers / self.size.num_experts)


@pytest.mark.parametrize(
    ("table", "spec"),
    [((4, 2, 4), "per_layer_top_k=4,2,4"), ((4, 4, 4), "top_k=4"), ((16, 16, 16), "dense"), ((3,), "top_k=3")],
)
def test_a_table_becomes_the_plainest_rule(table, spec):
    assert to_rule(table, 16).to_spec() == spec


@pytest.mark.parametrize(
    ("num_experts", "expected"),
    [(1, []), (2, [1]), (4, [1, 2, 3]), (32, [1, 2, 3, 4, 6, 8, 11, 16, 23]), (33, [1, 2, 3, 4, 6, 8, 11, 16, 23, 32])],
)
def test_profiled_numbers_grow_by_the_same_factor(num_experts, expected):
    assert choose_profiled_top_k(num_experts) == expected


@pytest.mark.parametrize(("budget", "expected"), [(0.3, 14), (1 / 16, 3), (1.0, 48), (0.062, 2), (0.1 + 0.2, 14)])
def test_a_budget_is_a_number_of_experts_in_all_layers(budget, expected):
    assert SIZE.count_kept(budget) == expected


def test_a_decimal_budget_is_not_robbed_of_an_expert_by_rounding():
    # 0.29 * 100 is 28.999999999999996.
    assert MixtureSize(num_layers=1, num_experts=100).count_kept(0.29) == 29


def test_a_profile_cuts_one_layer_at_a_time():
    model = Model()
    profile = measure_profile(model.measure, SIZE)
    assert profile.top_k == [1, 2, 3, 4, 6, 8, 11]
    for layer, weight in enumerate(WEIGHTS):
        expected = [weight * (1 / k - 1 / 16) for k in profile.top_k]
        assert profile.loss_increase[layer] == pytest.approx(expected, abs=1e-12)
    assert len(model.measured) == 1 + 3 * 7
    tables = [rule.per_layer_top_k for rule in model.measured[1:]]
    assert all(sum(k < 16 for k in table) == 1 for table in tables)


@pytest.mark.parametrize("budget", [1 / 16, 0.1, 0.25, 0.3, 0.6, 1.0])
def test_a_planned_table_keeps_to_the_budget_and_gives_more_to_the_layer_that_needs_more(budget):
    model = Model()
    table = plan_table(measure_profile(model.measure, SIZE), budget, SIZE)
    assert sum(table) <= budget * 48 and table[0] >= table[2] >= table[1] >= 1
    uniform = [int(budget * 16)] * 3
    assert model.loss(table) <= model.loss(uniform)


def test_a_model_of_one_layer_gets_what_the_budget_allows():
    size = MixtureSize(num_layers=1, num_experts=4)
    profile = measure_profile(Model(size, weights=(1.0,)).measure, size)
    assert plan_table(profile, 0.5, size) == (2,)


def test_a_mixture_of_one_expert_has_one_table():
    size = MixtureSize(num_layers=2, num_experts=1)
    profile = measure_profile(Model(size, weights=(1.0, 1.0)).measure, size)
    assert profile == LayerProfile(top_k=[], loss_increase=[[], []])
    assert plan_table(profile, 1.0, size) == (1, 1)


def scores(num=10_000):
    return np.sort(np.random.default_rng(0).exponential(1.0, num)).clip(max=15.9)


def thresholds_that_keep(shift):
    """A model in which a threshold keeps more, or less, than the scores with every expert on say."""
    found = scores()

    def measure(stage, rules):
        return [Cost(1.0, float((found * shift > rule.threshold).mean())) for rule in rules]

    return measure


@pytest.mark.parametrize("budget", [1 / 16, 0.3, 0.7])
@pytest.mark.parametrize("shift", [0.7, 1.0, 1.5])
def test_a_threshold_spends_nearly_all_of_the_budget_and_no_more(budget, shift):
    measure = thresholds_that_keep(shift)
    rule = find_threshold(measure, scores(), budget, SIZE)
    [cost] = measure("", [rule])
    assert 0.98 * budget <= cost.active_ffn_ratio <= budget


def test_the_whole_budget_is_a_threshold_that_keeps_everything():
    assert threshold_at(scores(), 1.0, SIZE) == RoutingConfig(mode="threshold", threshold=0.0)
    rule = find_threshold(lambda stage, rules: [Cost(1.0, 1.0)], scores(), 1.0, SIZE)
    assert rule == RoutingConfig(mode="threshold", threshold=0.0)


def test_a_threshold_is_short_and_possible():
    assert threshold_at(scores(), 0.3, SIZE).threshold == pytest.approx(-np.log(0.3), rel=0.05)
    assert len(threshold_at(scores(), 0.3, SIZE).to_spec()) <= len("threshold=0.0123")
    # All scores at the top: what rounds up to num_experts would be refused as a threshold.
    threshold_at(np.full(10, 15.9999), 0.5, SIZE).check_against(16)


def test_where_every_threshold_keeps_too_much_there_is_none():
    assert find_threshold(lambda stage, rules: [Cost(1.0, 0.9)], scores(), 0.1, SIZE) is None
