"""Both ways of ``sparse_forward``, one token with its experts side by side and expert by expert, are one function."""

import pytest
import torch

from dsmoe_ray.model import experts
from dsmoe_ray.model.experts import sparse_forward

ACTIVATIONS = pytest.mark.parametrize("activation", ["gelu", "swiglu"])
# Float64 sums of a few dozen terms in two orders differ by some 1e-15.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def make_inputs(activation, *, num_tokens, top_k, num_experts=5, d_model=6, d_ff=4):
    weights = {
        f"w{number}_LFD": randn(num_experts, d_ff, d_model, seed=number)
        for number in ((1, 2, 3) if activation == "swiglu" else (1, 2))
    }
    weights.setdefault("w3_LFD", None)
    scores_NL = randn(num_tokens, num_experts, seed=7).detach()
    selected_NL = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    selected_NL.scatter_(1, scores_NL.topk(top_k).indices, True)
    return randn(num_tokens, d_model, seed=8), randn(num_tokens, num_experts, seed=9), selected_NL, weights


def gradients(output, x, gates, weights):
    inputs = [x, gates, *(weight for weight in weights.values() if weight is not None)]
    return torch.autograd.grad(output.sin().sum(), inputs, allow_unused=True)


@ACTIVATIONS
@pytest.mark.parametrize("top_k", [0, 1, 3, 5])
def test_a_single_token_gets_the_same_output_and_gradients_on_either_way(activation, top_k, monkeypatch):
    x, gates, selected, weights = make_inputs(activation, num_tokens=1, top_k=top_k)
    gathered = sparse_forward(x, gates, selected, **weights)
    monkeypatch.setattr(experts, "_GATHERED_EXPERT_ELEMENTS", 0)
    looped = sparse_forward(x, gates, selected, **weights)
    torch.testing.assert_close(gathered, looped, **CLOSE)
    if top_k == 0:
        assert torch.equal(gathered, torch.zeros_like(x))
        return
    for found, expected in zip(
        gradients(gathered, x, gates, weights), gradients(looped, x, gates, weights), strict=True
    ):
        torch.testing.assert_close(found, expected, **CLOSE)


@ACTIVATIONS
def test_a_batch_is_its_tokens_one_by_one(activation):
    x, gates, selected, weights = make_inputs(activation, num_tokens=7, top_k=2)
    whole = sparse_forward(x, gates, selected, **weights)
    rows = [slice(token, token + 1) for token in range(7)]
    parts = torch.cat([sparse_forward(x[row], gates[row], selected[row], **weights) for row in rows])
    torch.testing.assert_close(whole, parts, **CLOSE)
    for found, expected in zip(gradients(whole, x, gates, weights), gradients(parts, x, gates, weights), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_no_tokens_give_no_outputs():
    x, gates, selected, weights = make_inputs("gelu", num_tokens=1, top_k=2)
    assert sparse_forward(x[:0], gates[:0], selected[:0], **weights).shape == (0, 6)
