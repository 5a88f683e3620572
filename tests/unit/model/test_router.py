"""Every routing rule against its definition, computed token by token in float64; gates; the two router networks."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.model.config import RouterConfig, RoutingConfig
from dsmoe_ray.model.router import Router, select
from tests.numerics.references import randn, router_probs, router_values, select_by_definition

GRID = 64
"""Probabilities are drawn as multiples of 1/64: exact in float32, so that ties and exact hits of a limit are common and
both sides must decide them by the rule, not by rounding."""


@st.composite
def probabilities(draw):
    """A few tokens over a few experts, each row summing to one on the grid."""
    num_tokens, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    rows = []
    for _ in range(num_tokens):
        cuts = sorted(draw(st.lists(st.integers(0, GRID), min_size=num_experts - 1, max_size=num_experts - 1)))
        rows.append(np.diff([0, *cuts, GRID]) / GRID)
    return np.array(rows)


def make_router(*, num_experts, d_model=6, **values):
    router = Router(RouterConfig.model_validate(router_values(**values)), num_experts=num_experts, d_model=d_model)
    with torch.no_grad():
        for index, parameter in enumerate(router.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=index))
    return router


def check(probs_TE, routing):
    """Compare the selection, the raw gates and the renormalized gates with the definition."""
    expected_TE = select_by_definition(probs_TE, routing)
    probs = torch.tensor(probs_TE, dtype=torch.float32)
    for renormalize in (False, True):
        gates_TE, selected_TE = select(probs, routing, renormalize=renormalize)
        found_TE = np.ones_like(expected_TE) if selected_TE is None else selected_TE.numpy()
        np.testing.assert_array_equal(found_TE, expected_TE)
        weights_TE = np.where(expected_TE, probs_TE, 0.0)
        if renormalize:
            weights_TE = weights_TE / np.maximum(weights_TE.sum(-1, keepdims=True), 1e-300)
        # One division and a sum of at most eight float32 numbers.
        np.testing.assert_allclose(gates_TE.numpy(), weights_TE, rtol=1e-6, atol=0)


@settings(deadline=None)
@given(probabilities(), st.integers(1, 8))
def test_top_k_keeps_the_k_largest_and_the_lower_id_among_equals(probs_TE, top_k):
    check(probs_TE, RoutingConfig(mode="top_k", top_k=min(top_k, probs_TE.shape[1])))


@settings(deadline=None)
@given(probabilities(), st.integers(0, 8 * GRID))
def test_threshold_keeps_what_is_strictly_above_it(probs_TE, threshold):
    check(probs_TE, RoutingConfig(mode="threshold", threshold=threshold / GRID))


@settings(deadline=None)
@given(probabilities(), st.integers(0, 8 * GRID))
def test_threshold_top_k_keeps_the_batch_mean_of_the_count_above_the_threshold(probs_TE, threshold):
    check(probs_TE, RoutingConfig(mode="threshold_top_k", threshold=threshold / GRID))


@settings(deadline=None)
@given(probabilities(), st.integers(1, GRID))
def test_top_p_keeps_the_fewest_that_reach_the_sum(probs_TE, top_p):
    check(probs_TE, RoutingConfig(mode="top_p", top_p=top_p / GRID))


@settings(deadline=None)
@given(probabilities())
def test_dense_keeps_everything_unchanged(probs_TE):
    check(probs_TE, RoutingConfig())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1, 3, 8, 32]), st.floats(0.1, 5.0))
def test_rules_hold_for_probabilities_of_a_real_router(seed, num_experts, sharpness):
    probs = (sharpness * randn(6, num_experts, seed=seed)).softmax(-1).float()
    # The same numbers in float64, so that only the rule and no rounding of inputs is compared.
    probs_TE = probs.double().numpy()
    rules = [RoutingConfig(mode="top_k", top_k=k) for k in {1, (num_experts + 1) // 2, num_experts}]
    rules += [RoutingConfig(mode=mode, threshold=0.48) for mode in ("threshold", "threshold_top_k")]
    for rule in [*rules, RoutingConfig(mode="top_p", top_p=0.61803)]:
        check(probs_TE, rule)


def test_a_uniform_router_keeps_the_first_experts():
    probs_TE = torch.full((3, 40), 1 / 40)
    for rule in (RoutingConfig(mode="top_k", top_k=7), RoutingConfig(mode="top_p", top_p=6.5 / 40)):
        _, selected_TE = select(probs_TE, rule, renormalize=False)
        assert selected_TE.sum(-1).tolist() == [7, 7, 7]
        assert selected_TE[:, :7].all()


def test_top_p_needs_no_further_expert_once_the_first_one_reaches_the_sum():
    """0.41 + 0.36 - 0.36 is below 0.41 in float32; the sum before the second expert is not."""
    probs_TE = torch.tensor([[0.41, 0.36, 0.23]])
    _, selected_TE = select(probs_TE, RoutingConfig(mode="top_p", top_p=0.41), renormalize=False)
    assert selected_TE.tolist() == [[True, False, False]]


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("gate_scale", [1.0, 4.0])
def test_scores_are_a_softmax_over_all_experts_and_gates_are_scaled_by_a_constant(kind, gate_scale):
    router = make_router(num_experts=5, kind=kind, gate_scale=gate_scale).double()
    x_TD = randn(4, 6, seed=3)
    routing = router(x_TD)
    expected_TE = router_probs(router, x_TD)
    torch.testing.assert_close(routing.router_probs_TE, expected_TE, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(routing.router_logits_TE.softmax(-1), expected_TE, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(routing.gates_TE, gate_scale * expected_TE, rtol=1e-12, atol=1e-14)
    assert [name for name, _ in router.named_parameters()] == (["hidden.weight"] * (kind == "mlp") + ["proj.weight"])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_routing_is_float32_when_the_model_computes_in_bfloat16(kind):
    router = make_router(num_experts=5, kind=kind)
    x_TD = randn(64, 6).bfloat16()
    routing = router(x_TD)
    assert {tensor.dtype for tensor in routing if tensor is not None} == {torch.float32}
    if kind == "linear":
        # Nothing is rounded after the input: a softmax in bfloat16 would be off by up to 4e-3.
        exact_TE = (x_TD.double() @ router.proj.weight.double().T).softmax(-1)
        torch.testing.assert_close(routing.router_probs_TE.double(), exact_TE, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "rule", [{"mode": "top_k", "top_k": 2}, {"mode": "top_p", "top_p": 0.6}], ids=["top_k", "top_p"]
)
def test_the_gradient_of_dropped_experts_flows_through_the_softmax_only(rule):
    """Raw gates: a dropped expert's logit still lowers the kept ones' probabilities, by the softmax's own Jacobian."""
    router = make_router(num_experts=4).double()
    x_TD = randn(3, 6, seed=5)
    routing = router(x_TD, RoutingConfig.model_validate(rule))
    weights_TE = randn(3, 4, seed=6)
    (found_TE,) = torch.autograd.grad((routing.gates_TE * weights_TE).sum(), routing.router_logits_TE)
    probs_TE, kept_TE = routing.router_probs_TE, weights_TE * routing.selected_TE
    expected_TE = probs_TE * (kept_TE - (probs_TE * kept_TE).sum(-1, keepdim=True))
    torch.testing.assert_close(found_TE, expected_TE, rtol=1e-12, atol=1e-14)


def test_forcing_balance_makes_all_probabilities_equal_and_keeps_the_router_in_the_graph():
    router = make_router(num_experts=4)
    router.force_balanced = True
    routing = router(randn(3, 6).float())
    torch.testing.assert_close(routing.router_probs_TE, torch.full((3, 4), 0.25))
    routing.gates_TE.sum().backward()
    assert torch.equal(router.proj.weight.grad, torch.zeros(4, 6))


@pytest.mark.parametrize("num_tokens, num_experts, top_k", [(12, 4, 1), (12, 4, 3), (10, 5, 2)])
@pytest.mark.parametrize("gates", ["raw", "renormalized"])
def test_forced_balance_gives_every_expert_equally_many_tokens(gates, num_tokens, num_experts, top_k):
    router = make_router(gates=gates, num_experts=num_experts)
    router.force_balanced = True
    rule = RoutingConfig.model_validate({"mode": "top_k", "top_k": top_k})
    routing = router(randn(num_tokens, 6).float(), rule)
    assert routing.selected_TE.sum(-1).tolist() == [top_k] * num_tokens
    assert routing.selected_TE.sum(0).tolist() == [num_tokens * top_k // num_experts] * num_experts
    gate = 1 / num_experts if gates == "raw" else 1 / top_k
    torch.testing.assert_close(routing.gates_TE, gate * routing.selected_TE)
