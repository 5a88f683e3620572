"""Sharing out experts among layers: within the budget, as good as trying everything, and never worse with more."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dsmoe_ray.evaluation.allocation import allocate, fill_profile


@st.composite
def problems(draw):
    """Any losses, not only falling ones, and a budget from one expert a layer to more than there are."""
    num_layers, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    # Multiples of 1/16 add up without rounding, so that equals are equal.
    losses = draw(arrays(np.int64, (num_layers, num_experts), elements=st.integers(-32, 160))) / 16
    return losses, draw(st.integers(num_layers, num_layers * num_experts + 2))


def total(losses_LE, table):
    return sum(losses_LE[layer, k - 1] for layer, k in enumerate(table))


@settings(deadline=None)
@given(problems())
def test_no_table_within_the_budget_is_better(problem):
    losses_LE, num_kept = problem
    num_layers, num_experts = losses_LE.shape
    table = allocate(losses_LE, num_kept)
    every = itertools.product(range(1, num_experts + 1), repeat=num_layers)
    assert len(table) == num_layers and all(1 <= k <= num_experts for k in table) and sum(table) <= num_kept
    assert total(losses_LE, table) == min(total(losses_LE, other) for other in every if sum(other) <= num_kept)


@settings(deadline=None)
@given(problems())
def test_a_larger_budget_never_costs_more_loss(problem):
    losses_LE, num_kept = problem
    assert total(losses_LE, allocate(losses_LE, num_kept + 1)) <= total(losses_LE, allocate(losses_LE, num_kept))


def test_no_expert_is_spent_that_brings_nothing():
    losses_LE = np.array([[3.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert allocate(losses_LE, 8) == (2, 1)


def test_layers_that_need_more_get_more():
    losses_LE = np.array([[0.5, 0.2, 0.1, 0.0], [0.01, 0.004, 0.001, 0.0], [0.02, 0.01, 0.005, 0.0]])
    assert allocate(losses_LE, 6) == (4, 1, 1)
    assert allocate(losses_LE, 3) == (1, 1, 1)


def test_a_model_of_many_layers_is_shared_out_in_no_time():
    # 64 layers of 256 experts; exact for convex losses, where taking the largest drop each time is exact too.
    generator = np.random.default_rng(0)
    drops_LE = np.sort(generator.integers(0, 1000, (64, 255)), axis=1)[:, ::-1]
    losses_LE = np.concatenate([np.zeros((64, 1)), -drops_LE.cumsum(1)], axis=1)
    table = allocate(losses_LE, 1000)
    best = -np.sort(drops_LE.flatten())[::-1][: 1000 - 64].sum()
    assert sum(table) <= 1000 and total(losses_LE, table) == best


def test_fewer_experts_than_layers_cannot_be_shared_out():
    with pytest.raises(ValueError, match="3 layers need at least one expert each; got 2"):
        allocate(np.zeros((3, 4)), 2)


def test_a_profile_is_filled_between_its_points_and_ends_at_nothing():
    filled_LE = fill_profile([1, 2, 4], np.array([[8.0, 4.0, 2.0], [1.0, 0.0, 0.5]]), num_experts=6)
    assert filled_LE[0].tolist() == [8.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    # More experts than needed do no harm: the smaller k is there to be taken.
    assert filled_LE[1].tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_mixture_of_one_expert_has_nothing_to_measure():
    assert fill_profile([], np.zeros((2, 0)), num_experts=1).tolist() == [[0.0], [0.0]]
