"""The sharding plan: pure functions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.mesh import AXES, axis_coordinates
from dsmoe_ray.parallel.sharding import is_expert_weight, plan_parameter

EXPERT, TRUNK = "blocks.3.ffn.experts.w2", "blocks.3.attention.wq"
DEGREES = st.builds(
    ParallelConfig,
    ep=st.integers(1, 4),
    dp_shard=st.integers(1, 3),
    dp_replicate=st.integers(1, 3),
    trunk=st.sampled_from(["replicate", "shard"]),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.0.ffn.experts.w1", True),
        ("ffn.experts.w3", True),
        ("blocks.0.ffn.w1", False),
        ("blocks.0.attention.wo", False),
        ("blocks.0.ffn.router.proj.weight", False),
    ],
)
def test_only_ffn_experts_are_expert_weights(name, expected):
    assert is_expert_weight(name) is expected


def test_ranks_of_one_ep_group_are_neighbours():
    config = ParallelConfig(dp_replicate=2, dp_shard=3, ep=4)
    expected = itertools.product(range(2), range(3), range(4))
    for rank, position in enumerate(expected):
        assert tuple(axis_coordinates(config, rank)[axis] for axis in AXES) == position


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\); got 2"):
        axis_coordinates(ParallelConfig(ep=2), 2)


@given(config=DEGREES, name=st.sampled_from([EXPERT, TRUNK]))
def test_each_part_of_a_parameter_is_counted_on_exactly_one_rank(config, name):
    plan = plan_parameter(name, config)
    counting = [
        tuple(axis_coordinates(config, rank)[axis] for axis in plan.shard_axes)
        for rank in range(config.world_size)
        if plan.is_counted_on(axis_coordinates(config, rank))
    ]
    every_part = itertools.product(*(range(getattr(config, axis)) for axis in plan.shard_axes))
    assert sorted(counting) == sorted(every_part)


@given(config=DEGREES)
def test_a_copied_trunk_is_summed_over_every_axis_and_a_managed_one_over_none(config):
    plan = plan_parameter(TRUNK, config)
    present = tuple(axis for axis in AXES if getattr(config, axis) > 1)
    assert plan.reduce_axes == (() if plan.managed_by_fsdp else present)


@given(config=DEGREES)
def test_expert_gradients_are_summed_by_us_over_copies_only(config):
    plan = plan_parameter(EXPERT, config)
    assert "ep" not in plan.reduce_axes
    assert not set(plan.reduce_axes) & set(plan.shard_axes)
    assert plan.managed_by_fsdp is (config.dp_shard > 1)
