"""Every routing rule against its definition in float64, from router logits to gates; tables of layers through a model.

The router computes in float32. Logits are drawn from a coarse grid, so that equal ones are equal in any precision and
unequal ones differ by far more than rounding; examples whose probabilities or sums come within 1e-5 of a limit are left
out, because there the two precisions may rightly decide otherwise (``tests/unit/model/test_router.py`` hits limits
exactly, with probabilities that float32 holds exactly).
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.model.config import RouterConfig, RoutingConfig, RoutingMode
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.router import Router
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.tiny_artifact import make_config
from tests.numerics.references import EXACT, router_gates, select_by_definition

LIMIT = 1e-5
"""Far above the rounding of a float32 softmax over 32 numbers, some 1e-6."""


@st.composite
def logits(draw):
    """A few tokens over a few experts; multiples of 1/4, among them many equal ones."""
    num_tokens, num_experts = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 5, 8, 17, 32]))
    width = draw(st.sampled_from([1, 4, 40]))
    return draw(arrays(np.int64, (num_tokens, num_experts), elements=st.integers(-width, width))) / 4


def softmax(logits_TE):
    scores_TE = np.exp(logits_TE - logits_TE.max(-1, keepdims=True))
    return scores_TE / scores_TE.sum(-1, keepdims=True)


def route(logits_TE, rule, *, gates="raw", gate_scale=1.0):
    """Run a router whose matrix is the identity, so that its logits are the tokens themselves."""
    num_experts = logits_TE.shape[1]
    config = RouterConfig(gates=gates, gate_scale=gate_scale)
    router = Router(config, num_experts=num_experts, d_model=num_experts)
    with torch.no_grad():
        router.proj.weight.copy_(torch.eye(num_experts))
        return router(torch.tensor(logits_TE, dtype=torch.float32), rule)


def check(logits_TE, rule, *, gates, gate_scale):
    probs_TE = softmax(logits_TE)
    selected_TE = select_by_definition(probs_TE, rule)
    expected_TE = np.where(selected_TE, probs_TE, 0.0)
    if gates == "renormalized":
        sums_T1 = expected_TE.sum(-1, keepdims=True)
        # A threshold may leave a token without experts: then there is nothing to divide.
        expected_TE = np.divide(expected_TE, sums_T1, out=np.zeros_like(expected_TE), where=sums_T1 > 0)
    found = route(logits_TE, rule, gates=gates, gate_scale=gate_scale)
    found_TE = np.ones_like(selected_TE) if found.selected_TE is None else found.selected_TE.numpy()
    np.testing.assert_array_equal(found_TE, selected_TE)
    # Some ten roundings of float32, each 6e-8; a probability below 1e-35 is no longer a normal number.
    np.testing.assert_allclose(found.gates_TE.numpy(), gate_scale * expected_TE, rtol=2e-6, atol=1e-35)


WEIGHING = st.fixed_dictionaries(
    {"gates": st.sampled_from(["raw", "renormalized"]), "gate_scale": st.sampled_from([1.0, 4.0, 0.3])}
)


@settings(deadline=None)
@given(logits(), WEIGHING)
def test_dense_uses_every_expert(logits_TE, weighing):
    check(logits_TE, RoutingConfig(), **weighing)


@settings(deadline=None)
@given(logits(), st.data(), WEIGHING)
def test_top_k_uses_the_k_largest_and_of_equals_the_lower_id(logits_TE, data, weighing):
    top_k = data.draw(st.integers(1, logits_TE.shape[1]))
    check(logits_TE, RoutingConfig(mode="top_k", top_k=top_k), **weighing)


@settings(deadline=None)
@given(logits(), st.sampled_from(["threshold", "threshold_top_k"]), st.floats(0.0, 3.0), WEIGHING)
def test_thresholds_count_what_lies_strictly_above(logits_TE, mode, threshold, weighing):
    scores_TE = logits_TE.shape[1] * softmax(logits_TE)
    # Zero is no limit that rounding could cross: no probability here is zero in either precision.
    assume(threshold == 0.0 or np.abs(scores_TE - threshold).min() > LIMIT * max(1.0, threshold))
    check(logits_TE, RoutingConfig(mode=mode, threshold=threshold), **weighing)


@settings(deadline=None)
@given(logits(), st.floats(0.001, 1.0 - 10 * LIMIT), WEIGHING)
def test_top_p_uses_the_fewest_that_reach_the_sum(logits_TE, top_p, weighing):
    sums_TE = np.sort(softmax(logits_TE), axis=-1)[:, ::-1].cumsum(-1)
    assume(np.abs(sums_TE - top_p).min() > LIMIT)
    check(logits_TE, RoutingConfig(mode="top_p", top_p=top_p), **weighing)


@settings(deadline=None)
@given(logits(), st.data(), WEIGHING)
def test_a_table_uses_in_each_layer_the_k_of_that_layer(logits_TE, data, weighing):
    table = data.draw(st.lists(st.integers(1, logits_TE.shape[1]), min_size=1, max_size=6))
    rule = RoutingConfig(mode="per_layer_top_k", per_layer_top_k=tuple(table))
    for layer, top_k in enumerate(table):
        of_layer = rule.at_layer(layer)
        assert (of_layer.mode, of_layer.top_k) == (RoutingMode.TOP_K, top_k)
        check(logits_TE, of_layer, **weighing)


def test_equal_experts_are_taken_from_the_lowest_id_on():
    logits_TE = np.array([[1.0, 2.0, 2.0, 2.0, 1.0]])
    for rule, ids in (("top_k=2", [1, 2]), ("top_k=4", [0, 1, 2, 3]), ("top_p=0.5", [1, 2])):
        found = route(logits_TE, RoutingConfig.parse(rule))
        assert found.selected_TE.nonzero()[:, 1].tolist() == ids


def test_a_threshold_above_every_score_leaves_a_token_without_experts():
    for gates in ("raw", "renormalized"):
        found = route(np.zeros((2, 4)), RoutingConfig.parse("threshold=1"), gates=gates)
        assert not found.selected_TE.any() and found.gates_TE.eq(0.0).all()


@pytest.mark.parametrize("gates", ["raw", "renormalized"])
@pytest.mark.parametrize(
    "spec",
    [
        "per_layer_top_k=4,1,2",
        "attention:per_layer_top_k=1,2,1/ffn:per_layer_top_k=1,2,3",
        "attention:top_k=1/ffn:threshold=0.9",
        "attention:threshold=0.8/ffn:dense",
    ],
)
def test_a_whole_model_routes_every_layer_and_part_by_its_own_rule(spec, gates):
    """In float64 on both sides, so that selections are equal and gates agree to its rounding."""
    values = make_config().model_dump()
    for part in ("attention", "ffn"):
        values[part]["router"]["gates"] = gates
    config = make_config(num_layers=3, attention=values["attention"], ffn=values["ffn"])
    model = Transformer(config, compute_dtype=torch.float64)
    initialize(model, config, seed=3)
    model = model.double().requires_grad_(False)
    inputs = {}
    for layer, block in enumerate(model.blocks):
        for part in ("attention", "ffn"):
            router = getattr(block, part).router
            router.register_forward_pre_hook(lambda _, args, key=(layer, part): inputs.update({key: args[0]}))
    tokens_BS = torch.randint(300, (2, 11), generator=torch.Generator().manual_seed(0))
    output = model(tokens_BS, routing=resolve_routing(spec, config))

    rules = dict(text.split(":") for text in spec.split("/")) if ":" in spec else {"ffn": spec}
    for part, decisions in (("attention", output.attention_routings), ("ffn", output.ffn_routings)):
        rule = RoutingConfig.parse(rules.get(part, "dense"))
        for layer, decision in enumerate(decisions):
            layer_rule = (
                rule if rule.per_layer_top_k is None else RoutingConfig.parse(f"top_k={rule.per_layer_top_k[layer]}")
            )
            expected_TE = router_gates(getattr(model.blocks[layer], part).router, inputs[layer, part], layer_rule)
            torch.testing.assert_close(decision.gates_TE, expected_TE.nan_to_num(0.0), **EXACT)
            num_kept = decision.gates_TE.ne(0).sum(-1)
            if layer_rule.top_k is not None:
                assert num_kept.eq(layer_rule.top_k).all()
    assert math.isfinite(output.logits_BSV.sum().item())
