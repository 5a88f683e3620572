"""The norm that trains on a CPU against the formula in float64, and against PyTorch's in the other types."""

import pytest
import torch
from torch.nn import functional

from dsmoe_ray.model.norm import RmsNorm, RmsNormOnCpu
from tests.numerics.references import randn

D_MODEL, EPS = 24, 1e-3


def both(dtype, *, shape=(3, 5, D_MODEL)):
    """Outputs and gradients of our norm and of PyTorch's computed in float64."""
    x, dy, weight = randn(*shape).to(dtype), randn(*shape, seed=1).to(dtype), 1 + 0.1 * randn(D_MODEL, seed=2).float()
    results = []
    for run in (ours, reference):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = run(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))))
    return results


def ours(x, weight):
    return torch.func.functional_call(RmsNorm(D_MODEL, EPS), {"weight": weight}, (x,))


def reference(x, weight):
    x, weight = x.double(), weight.double()
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def test_the_gradient_is_that_of_finite_differences():
    x, weight = randn(2, 3, D_MODEL).requires_grad_(), (1 + 0.1 * randn(D_MODEL, seed=1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: RmsNormOnCpu.apply(x, weight, EPS), (x, weight))


# A few roundings of each type: of the largest number for float32, of every number for bfloat16.
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["float32", "bf16"]
)
def test_output_and_gradients_follow_the_formula(dtype, tolerance):
    found, expected = both(dtype)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    for mine, theirs in zip(found, expected, strict=True):
        deviation = (mine.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert deviation < tolerance


def test_training_and_inference_agree_to_rounding():
    norm, x = RmsNorm(D_MODEL, EPS), randn(4, D_MODEL).float()
    torch.nn.init.ones_(norm.weight)
    trained = norm(x)
    with torch.no_grad():
        inferred = norm(x)
    assert trained.requires_grad and not inferred.requires_grad
    torch.testing.assert_close(trained.detach(), inferred, rtol=3e-7, atol=0)
    assert torch.equal(inferred, functional.rms_norm(x, (D_MODEL,), norm.weight, EPS))
