"""Running only the selected experts gives what the dense formula gives with the other gates set to zero."""

import pytest
import torch

from dsmoe_ray.model import experts as experts_module
from dsmoe_ray.model.config import RoutingConfig
from tests.numerics.references import (
    EXACT,
    assert_same,
    exact_context,
    make_moa,
    make_moe,
    randn,
    router_gates,
    router_values,
    sum_of_attentions,
    sum_of_experts,
    with_parameters,
)

RULES = pytest.mark.parametrize(
    "routing",
    [
        RoutingConfig(mode="top_k", top_k=1),
        RoutingConfig(mode="top_k", top_k=2),
        RoutingConfig(mode="top_k", top_k=3),
        RoutingConfig(mode="threshold", threshold=0.3),
        RoutingConfig(mode="threshold_top_k", threshold=0.3),
        RoutingConfig(mode="top_p", top_p=0.7),
    ],
    ids=["top_1", "top_2", "top_3", "threshold", "threshold_top_k", "top_p"],
)
ROUTERS = pytest.mark.parametrize(
    "router",
    [
        router_values(kind, gates=gates, gate_scale=2.0)
        for kind in ("linear", "mlp")
        for gates in ("raw", "renormalized")
    ],
    ids=["linear-raw", "linear-renormalized", "mlp-raw", "mlp-renormalized"],
)
ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "swiglu"])


@RULES
@ROUTERS
@ACTIVATIONS
def test_a_sparse_ffn_mixture_is_the_dense_formula_with_other_gates_zero(routing, router, activation):
    moe = make_moe(activation=activation, router=router)
    x_BSD = randn(2, 6, 6, seed=1).requires_grad_()
    found, decision = moe(x_BSD, routing)
    x_TD = x_BSD.flatten(0, 1)
    gates_TE = router_gates(moe.router, x_TD, routing)
    # Without this the comparison would also hold for a rule that keeps everything.
    assert 0 < int(decision.selected_TE.sum()) < decision.selected_TE.numel()
    assert torch.equal(decision.selected_TE, gates_TE > 0)
    assert_same(found, sum_of_experts(moe.experts, x_TD, gates_TE).view_as(x_BSD), **with_parameters(x_BSD, moe))


@RULES
@ROUTERS
def test_a_sparse_attention_mixture_is_the_dense_formula_with_other_gates_zero(routing, router):
    moa = make_moa(router=router, num_experts=4)
    x_BSD = randn(2, 6, 6, seed=1).requires_grad_()
    found, decision = moa(x_BSD, exact_context(6, 4), routing)
    gates_TE = router_gates(moa.router, x_BSD.flatten(0, 1), routing)
    assert 0 < int(decision.selected_TE.sum()) < decision.selected_TE.numel()
    expected = sum_of_attentions(moa, x_BSD, gates_TE.view(2, 6, 4))
    assert_same(found, expected, **with_parameters(x_BSD, moa))


@RULES
@ACTIVATIONS
@pytest.mark.parametrize("largest_copied", [0, 1 << 16], ids=["by-expert", "copied-together"])
def test_a_single_token_is_the_dense_formula_too(routing, activation, largest_copied, monkeypatch):
    """One token may take a path of its own: its experts' weights copied together into one narrow FFN."""
    monkeypatch.setattr(experts_module, "_GATHERED_EXPERT_ELEMENTS", largest_copied)
    moe = make_moe(activation=activation, router=router_values(gates="renormalized", gate_scale=2.0))
    for seed in range(3):
        x_BSD = randn(1, 1, 6, seed=seed).requires_grad_()
        found, _ = moe(x_BSD, routing)
        gates_TE = router_gates(moe.router, x_BSD[0], routing)
        expected = sum_of_experts(moe.experts, x_BSD[0], gates_TE).view_as(x_BSD)
        assert_same(found, expected, **with_parameters(x_BSD, moe))


@ACTIVATIONS
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_token_without_an_expert_leaves_zero_gradients_in_all_weights(activation, num_tokens):
    experts = make_moe(activation=activation).experts
    x_TD = randn(num_tokens, 6, seed=1).requires_grad_()
    y_TD = experts(x_TD, torch.zeros(num_tokens, 5).double(), torch.zeros(num_tokens, 5, dtype=torch.bool))
    assert torch.equal(y_TD, torch.zeros_like(y_TD))
    if y_TD.requires_grad:
        y_TD.sum().backward()
        for weight in experts.parameters():
            assert weight.grad is None or torch.equal(weight.grad, torch.zeros_like(weight))


@ACTIVATIONS
def test_the_sparse_path_with_all_experts_selected_is_the_dense_path(activation):
    experts = make_moe(activation=activation).experts
    x_TD, gates_TE = randn(9, 6, seed=1).requires_grad_(), randn(9, 5, seed=2).requires_grad_()
    sparse = experts(x_TD, gates_TE, torch.ones(9, 5, dtype=torch.bool))
    named = dict(experts.named_parameters())
    assert_same(sparse, experts(x_TD, gates_TE), [x_TD, gates_TE, *named.values()], names=["x", "gates", *named])


@ROUTERS
@pytest.mark.parametrize(
    "routing",
    [
        RoutingConfig(mode="top_k", top_k=5),
        RoutingConfig(mode="threshold", threshold=0.0),
        RoutingConfig(mode="top_p", top_p=1.0),
    ],
    ids=["top_k", "threshold", "top_p"],
)
def test_a_rule_that_keeps_all_experts_is_dense_whatever_the_gates(routing, router):
    moe = make_moe(activation="swiglu", router=router)
    x_BSD = randn(2, 6, 6, seed=1).requires_grad_()
    assert_same(moe(x_BSD, routing)[0], moe(x_BSD)[0], **with_parameters(x_BSD, moe))


@pytest.mark.parametrize("gates", ["raw", "renormalized"])
@ACTIVATIONS
def test_a_token_without_an_expert_gets_zero_and_finite_gradients(gates, activation):
    moe = make_moe(activation=activation, router=router_values(gates=gates))
    # The router sees channel 0 only. Where that is zero it scores all alike, and N * 1/N = 1 is not above 1.
    x_BSD = randn(1, 6, 6, seed=1)
    x_BSD[:, ::2, 0] = 0.0
    x_BSD.requires_grad_()
    with torch.no_grad():
        moe.router.proj.weight[:, 1:] = 0.0
    found, decision = moe(x_BSD, RoutingConfig(mode="threshold", threshold=1.0))
    assert not decision.selected_TE[::2].any() and decision.selected_TE[1::2].any()
    assert torch.equal(found[:, ::2], torch.zeros(1, 3, 6, dtype=torch.float64))
    for gradient in torch.autograd.grad(found.square().sum(), [x_BSD, *moe.parameters()]):
        assert torch.isfinite(gradient).all()


def test_when_no_token_keeps_any_expert_the_layer_adds_nothing_and_still_trains():
    moe = make_moe()
    x_BSD = randn(1, 4, 6, seed=1).requires_grad_()
    found, _ = moe(x_BSD, RoutingConfig(mode="threshold", threshold=4.9999999))
    (x_BSD + found).sum().backward()
    assert torch.equal(found, torch.zeros_like(found))
    assert torch.equal(x_BSD.grad, torch.ones_like(x_BSD))


def test_an_expert_that_nobody_selected_gets_a_zero_gradient_not_none():
    """A gradient of None on one rank and not on another would make the ranks' reductions differ."""
    moe = make_moe(activation="swiglu")
    with torch.no_grad():
        moe.router.proj.weight.zero_()
    found, decision = moe(randn(1, 8, 6, seed=1), RoutingConfig(mode="top_k", top_k=2))
    found.square().sum().backward()
    assert decision.selected_TE[:, :2].all()
    for weight in moe.experts.parameters():
        assert torch.equal(weight.grad[2:], torch.zeros_like(weight.grad[2:]))
        assert weight.grad[:2].abs().sum() > 0


def test_sparse_outputs_of_a_token_do_not_depend_on_the_other_tokens():
    moe = make_moe(activation="swiglu")
    x_BSD, rule = randn(1, 12, 6, seed=1), RoutingConfig(mode="top_k", top_k=2)
    whole, _ = moe(x_BSD, rule)
    for start in range(0, 12, 5):
        part, _ = moe(x_BSD[:, start : start + 5], rule)
        torch.testing.assert_close(part, whole[:, start : start + 5], **EXACT)
