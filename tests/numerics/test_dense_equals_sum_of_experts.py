"""Training every expert as one wide FFN is the mixture as it is defined: the gated sum of separate experts."""

import pytest
import torch

from dsmoe_ray.model.dispatch import LocalExchange
from tests.numerics.references import (
    DENSE,
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

ROUTERS = pytest.mark.parametrize(
    "router",
    [
        router_values("linear"),
        router_values("mlp"),
        router_values("linear", gates="renormalized"),
        router_values("linear", gate_scale=5.0),
        router_values("mlp", gates="renormalized", gate_scale=0.5),
    ],
    ids=["linear", "mlp", "linear-renormalized", "linear-scaled", "mlp-renormalized-scaled"],
)
ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "swiglu"])


class ChunkedExchange(LocalExchange):
    """Everything is here, but tokens are worked on in parts."""

    def __init__(self, num_chunks):
        self.num_chunks = num_chunks


@ACTIVATIONS
@ROUTERS
def test_a_dense_ffn_mixture_is_the_gated_sum_of_its_experts(router, activation):
    moe = make_moe(activation=activation, router=router)
    x_BSD = randn(2, 5, 6, seed=1).requires_grad_()
    found, routing = moe(x_BSD)
    x_TD = x_BSD.flatten(0, 1)
    expected = sum_of_experts(moe.experts, x_TD, router_gates(moe.router, x_TD, DENSE)).view_as(x_BSD)
    assert routing.selected_TE is None
    assert_same(found, expected, **with_parameters(x_BSD, moe))


@ACTIVATIONS
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4, 7, 20])
def test_working_on_tokens_in_parts_changes_nothing(num_chunks, activation):
    # 11 tokens divide by none of these numbers, so that the last part is shorter and some parts do not exist.
    experts = make_moe(activation=activation).experts
    x_TD, gates_TE = randn(11, 6, seed=1).requires_grad_(), randn(11, 5, seed=2).requires_grad_()
    found = experts(x_TD, gates_TE, None, ChunkedExchange(num_chunks))
    expected = sum_of_experts(experts, x_TD, gates_TE)
    named = dict(experts.named_parameters())
    inputs = [x_TD, gates_TE, *named.values()]
    assert_same(found, expected, inputs, names=["x", "gates", *named])


@ROUTERS
@pytest.mark.parametrize("num_kv_heads", [1, 2, 3])
def test_a_dense_attention_mixture_is_the_gated_sum_of_separate_attentions(router, num_kv_heads):
    moa = make_moa(router=router, num_kv_heads=num_kv_heads)
    x_BSD = randn(2, 7, 6, seed=1).requires_grad_()
    found, routing = moa(x_BSD, exact_context(7, 4))
    gates_BSE = router_gates(moa.router, x_BSD.flatten(0, 1), DENSE).view(2, 7, 3)
    assert routing.selected_TE is None
    assert_same(found, sum_of_attentions(moa, x_BSD, gates_BSE), **with_parameters(x_BSD, moa))


def test_gates_weigh_outputs_even_where_they_are_negative_or_large():
    """Gates come from a softmax today; the identity that lets them act on hidden units does not depend on it."""
    experts = make_moe(activation="swiglu").experts
    x_TD, gates_TE = randn(4, 6, seed=1), 100.0 * randn(4, 5, seed=2)
    torch.testing.assert_close(experts(x_TD, gates_TE), sum_of_experts(experts, x_TD, gates_TE), rtol=1e-11, atol=1e-10)
