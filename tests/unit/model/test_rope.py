"""Rotations against complex multiplication, their gradient, and the property they exist for."""

import pytest
import torch

from dsmoe_ray.model.rope import Rotate, compute_rotations
from tests.numerics.references import randn, rotate_by_definition


def angles(num_positions, head_dim, theta=10000.0):
    cos, sin = compute_rotations(num_positions, head_dim, theta)
    return cos[None, :, None], sin[None, :, None]


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotation_is_multiplication_by_a_unit_complex_number(theta):
    x_BSHd = randn(2, 40, 3, 8)
    found = Rotate.apply(x_BSHd, *angles(40, 8, theta))
    for head in range(3):
        # Angles are stored as float32 cosines and sines: 6e-8 of entries up to four.
        torch.testing.assert_close(
            found[:, :, head], rotate_by_definition(x_BSHd[:, :, head], theta), rtol=0, atol=5e-7
        )


def test_angles_are_exact_to_float32_at_far_positions():
    """float32 angles would be off by 4e-3 at position 100000; cosines are taken of float64 ones."""
    cos, sin = compute_rotations(100_001, 4, 10000.0)
    position = torch.tensor(100_000.0, dtype=torch.float64)
    for pair, frequency in enumerate([1.0, 0.01]):
        angle = position * frequency
        assert abs(cos[-1, pair].item() - torch.cos(angle).item()) < 1e-7
        assert abs(sin[-1, pair].item() - torch.sin(angle).item()) < 1e-7


def test_the_gradient_is_the_inverse_rotation():
    cos, sin = angles(5, 6)
    x_BSHd = randn(2, 5, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, cos, sin), (x_BSHd,))


def test_it_takes_tensors_that_are_views_of_others():
    """Queries of attention experts come transposed; the output buffer is made like the input."""
    cos, sin = angles(5, 6)
    whole = randn(2, 3, 5, 6)
    expected = Rotate.apply(whole.transpose(1, 2).contiguous(), cos, sin)
    assert torch.equal(Rotate.apply(whole.transpose(1, 2), cos, sin), expected)
    one = randn(2, 1, 1, 6).expand(2, 5, 3, 6)
    assert torch.equal(Rotate.apply(one, cos, sin), Rotate.apply(one.contiguous(), cos, sin))


def test_scores_depend_on_the_distance_of_positions_only():
    cos, sin = angles(30, 8)
    q, k = (randn(1, 1, 1, 8, seed=seed).expand(1, 30, 1, 8) for seed in (1, 2))
    q, k = Rotate.apply(q, cos, sin)[0, :, 0], Rotate.apply(k, cos, sin)[0, :, 0]
    scores = q @ k.T
    for distance in (0, 1, 7):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=5e-6)
    assert (scores.diagonal(-1) - scores.diagonal(-7)[:1]).abs().min() > 1e-3


def test_bfloat16_is_rounded_once():
    cos, sin = angles(20, 8)
    x_BSHd = randn(1, 20, 2, 8).bfloat16()
    exact = Rotate.apply(x_BSHd.double(), cos, sin)
    found = Rotate.apply(x_BSHd, cos, sin)
    assert found.dtype == torch.bfloat16
    # Half a unit in the last of eight bits, and nothing on top.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)
