"""Gating of attention heads in one pass: values and gradients of the plain product."""

import pytest
import torch

from dsmoe_ray.model.moa import GateHeads, gate_heads
from tests.numerics.references import randn

BATCH, NUM_NEW, NUM_EXPERTS, NUM_KV_HEADS, HEAD_DIM = 2, 3, 4, 2, 5


def make_heads() -> torch.Tensor:
    """Heads in the order attention leaves them in: positions inside heads, KV heads before experts."""
    out_BHSd = randn(BATCH, NUM_KV_HEADS * NUM_EXPERTS, NUM_NEW, HEAD_DIM)
    return out_BHSd.transpose(1, 2).unflatten(2, (NUM_KV_HEADS, NUM_EXPERTS)).transpose(2, 3)


def test_gated_heads_are_the_plain_product_laid_side_by_side():
    out_BSEGd, gates_BSE = make_heads(), randn(BATCH, NUM_NEW, NUM_EXPERTS, seed=1)
    gated_BSW = gate_heads(out_BSEGd, gates_BSE)
    assert gated_BSW.is_contiguous()
    assert torch.equal(gated_BSW, (out_BSEGd * gates_BSE[..., None, None]).flatten(2))


def test_the_gradient_is_that_of_finite_differences():
    gates_BSE = randn(BATCH, NUM_NEW, NUM_EXPERTS, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(GateHeads.apply, (make_heads().requires_grad_(), gates_BSE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gates_and_their_gradient_stay_float32(dtype):
    gates_BSE = randn(BATCH, NUM_NEW, NUM_EXPERTS, seed=1).float().requires_grad_()
    gated_BSW = gate_heads(make_heads().to(dtype), gates_BSE)
    gated_BSW.float().sum().backward()
    assert gated_BSW.dtype == dtype and gates_BSE.grad.dtype == torch.float32
    # Sums of ten numbers that were rounded to the type of the heads.
    expected = make_heads().to(dtype).float().sum((-2, -1))
    torch.testing.assert_close(gates_BSE.grad, expected, rtol=2e-2, atol=2e-2)
