"""Router statistics of a step: sums over ranks and micro-steps, and what is reported of them."""

import pytest
import torch

from dsmoe_ray.model.config import RoutingConfig
from dsmoe_ray.model.router import Routing, select
from dsmoe_ray.training.config import LossConfig
from dsmoe_ray.training.router_statistics import StepStatistics

NUM_LAYERS, NUM_TOKENS, NUM_EXPERTS = 2, 24, 6
LOSSES = LossConfig(mutual_information_attention=0.3, mutual_information_ffn=0.5, load_balance=0.7, router_z=0.2)
TOP_2 = RoutingConfig.model_validate({"mode": "top_k", "top_k": 2})


def make_routings(seed, *, num_experts=NUM_EXPERTS, routing=TOP_2) -> list[Routing]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(NUM_LAYERS):
        logits_TE = 2.0 * torch.randn(NUM_TOKENS, num_experts, generator=generator)
        probs_TE = logits_TE.softmax(-1)
        found.append(Routing(logits_TE, probs_TE, *select(probs_TE, routing, renormalize=False)))
    return found


def part_of(routings, rows) -> list[Routing]:
    return [Routing(*(None if field is None else field[rows] for field in routing)) for routing in routings]


def nothing(tensor):
    """Sum over the one rank there is."""


def whole(attention, ffn, loss_sum=3.0) -> StepStatistics:
    statistics = StepStatistics(nothing, world_size=1)
    statistics.add_micro_step(torch.tensor(loss_sum), attention, ffn, num_tokens=NUM_TOKENS)
    return statistics


def check_summary(found, routings):
    """Compare with the formulas in float64, layer by layer."""
    values = []
    for routing in routings:
        logits_TE = routing.router_logits_TE.double()
        probs_TE = logits_TE.softmax(-1)
        mean_E = probs_TE.mean(0)
        entropy = torch.distributions.Categorical(probs_TE).entropy().mean()
        load_E = (probs_TE if routing.selected_TE is None else routing.selected_TE.double()).sum(0)
        share_E = load_E / load_E.sum()
        values.append(
            {
                "mi": entropy - torch.distributions.Categorical(mean_E).entropy(),
                "entropy": entropy,
                "load_balance": logits_TE.shape[1] * (share_E * mean_E).sum(),
                "router_z": logits_TE.exp().sum(-1).log().square().mean(),
                "balance": share_E.max() / share_E.mean(),
            }
        )
    for name in values[0]:
        expected = sum(float(value[name]) for value in values) / len(values)
        # Sums of 24 tokens in float32.
        assert found[name] == pytest.approx(expected, rel=2e-6, abs=1e-6), name


@pytest.mark.parametrize("routing", [RoutingConfig(), TOP_2], ids=["dense", "top_k"])
def test_reported_values_are_those_of_the_formulas(routing):
    attention, ffn = make_routings(0, num_experts=3, routing=RoutingConfig()), make_routings(1, routing=routing)
    statistics = whole(attention, ffn)
    check_summary(statistics.ffn.summary(), ffn)
    check_summary(statistics.attention.summary(), attention)
    assert statistics.loss_sum == 3.0


def test_micro_steps_add_up_to_the_whole():
    attention, ffn = make_routings(0, num_experts=3), make_routings(1)
    statistics = StepStatistics(nothing, world_size=1)
    for loss_sum, rows in ((1.0, slice(0, 8)), (1.5, slice(8, 16)), (0.5, slice(16, 24))):
        statistics.add_micro_step(torch.tensor(loss_sum), part_of(attention, rows), part_of(ffn, rows), num_tokens=8)
    assert statistics.loss_sum == 3.0
    check_summary(statistics.ffn.summary(), ffn)
    check_summary(statistics.attention.summary(), attention)


def test_ranks_add_up_to_the_whole():
    """The all-reduce of rank 0 adds what rank 1 has."""
    attention, ffn = make_routings(0, num_experts=3), make_routings(1)
    halves = [slice(0, 12), slice(12, 24)]
    sent = []
    StepStatistics(sent.append, world_size=2).add_micro_step(
        torch.tensor(1.0), part_of(attention, halves[1]), part_of(ffn, halves[1]), num_tokens=12
    )
    statistics = StepStatistics(lambda tensor: tensor.add_(sent[0]), world_size=2)
    statistics.add_micro_step(torch.tensor(2.0), part_of(attention, halves[0]), part_of(ffn, halves[0]), num_tokens=12)
    assert len(sent) == 1, "one all-reduce per micro-step"
    assert statistics.loss_sum == 3.0
    check_summary(statistics.ffn.summary(), ffn)
    check_summary(statistics.attention.summary(), attention)


def test_the_shares_of_the_loss_sum_to_the_reported_value():
    attention, ffn = make_routings(0, num_experts=3), make_routings(1)
    statistics = whole(attention, ffn)
    shares = [
        statistics.router_loss(part_of(attention, rows), part_of(ffn, rows), LOSSES, num_tokens=NUM_TOKENS)
        for rows in (slice(0, 7), slice(7, 24))
    ]
    assert float(sum(shares)) == pytest.approx(statistics.router_loss_value(LOSSES), rel=1e-5)
    a, f = statistics.attention.summary(), statistics.ffn.summary()
    expected = 2 * (0.3 * a["mi"] + 0.5 * f["mi"] + 0.7 * f["load_balance"] + 0.2 * f["router_z"])
    assert statistics.router_loss_value(LOSSES) == pytest.approx(expected)


def test_without_weights_there_is_no_router_loss():
    attention, ffn = make_routings(0), make_routings(1)
    statistics = whole(attention, ffn)
    assert statistics.router_loss(attention, ffn, LossConfig(), num_tokens=NUM_TOKENS) is None
    assert statistics.router_loss_value(LossConfig()) == 0.0


def test_load_share_counts_selected_experts_or_else_probabilities():
    sparse, dense = make_routings(1), make_routings(1, routing=RoutingConfig())
    selected_LE = torch.stack([routing.selected_TE.float().sum(0) for routing in sparse])
    torch.testing.assert_close(whole([], sparse).ffn.load_share, selected_LE / (2 * NUM_TOKENS))
    probs_LE = torch.stack([routing.router_probs_TE.mean(0) for routing in dense])
    torch.testing.assert_close(whole([], dense).ffn.load_share, probs_LE)


def test_a_router_that_selects_nothing_has_no_load_and_divides_by_nothing():
    routings = make_routings(0, routing=RoutingConfig.model_validate({"mode": "threshold", "threshold": 5.999}))
    assert not any(routing.selected_TE.any() for routing in routings)
    statistics = whole([], routings)
    assert torch.equal(statistics.ffn.load_share, torch.zeros(NUM_LAYERS, NUM_EXPERTS))
    assert statistics.ffn.summary()["balance"] == 0.0


def test_a_model_without_mixtures_reports_neutral_values():
    statistics = whole([], [])
    neutral = {"mi": 0.0, "entropy": 0.0, "load_balance": 0.0, "router_z": 0.0, "balance": 1.0}
    assert statistics.ffn.summary() == statistics.attention.summary() == neutral
    assert statistics.router_loss([], [], LOSSES, num_tokens=NUM_TOKENS) is None
    assert statistics.router_loss_value(LOSSES) == 0.0


def test_statistics_take_no_part_in_the_gradient():
    logits_TE = torch.randn(NUM_TOKENS, NUM_EXPERTS, requires_grad=True)
    probs_TE = logits_TE.softmax(-1)
    routings = [Routing(logits_TE, probs_TE, *select(probs_TE, TOP_2, renormalize=False))]
    assert not whole([], routings).ffn.mean_probs.requires_grad
