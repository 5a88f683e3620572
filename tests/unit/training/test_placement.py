"""Where shards go on clusters of several shapes."""

import pytest

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.training.placement import plan_placement


def test_the_ranks_of_an_ep_group_share_a_bundle_and_thereby_a_node():
    plan = plan_placement(ParallelConfig(ep=4, dp_replicate=2, cpus_per_shard=2), [{"CPU": 8.0}, {"CPU": 8.0}])
    assert plan.bundles == ({"CPU": 8.0}, {"CPU": 8.0})
    assert plan.bundle_of_rank == (0, 0, 0, 0, 1, 1, 1, 1)


def test_a_group_larger_than_any_node_gets_a_bundle_for_each_shard():
    plan = plan_placement(ParallelConfig(ep=4), [{"CPU": 2.0}, {"CPU": 2.0}])
    assert plan.bundles == ({"CPU": 1.0},) * 4
    assert plan.bundle_of_rank == (0, 1, 2, 3)


def test_a_cluster_with_gpus_gives_each_shard_one():
    plan = plan_placement(ParallelConfig(ep=2, cpus_per_shard=4), [{"CPU": 16.0, "GPU": 2.0}])
    assert plan.bundles == ({"CPU": 8.0, "GPU": 2.0},)
    assert (plan.device, plan.gpus_per_shard) == ("cuda", 1)


def test_gpus_are_left_alone_when_the_run_is_for_cpus():
    plan = plan_placement(ParallelConfig(ep=2, device="cpu"), [{"CPU": 4.0, "GPU": 2.0}])
    assert (plan.device, plan.gpus_per_shard, plan.bundles) == ("cpu", 0, ({"CPU": 2.0},))


@pytest.mark.parametrize(
    ("parallel", "nodes", "message"),
    [
        (ParallelConfig(ep=4, cpus_per_shard=2), [{"CPU": 4.0}], "cannot hold 4 shards of 2 CPU each .*: 4 CPU"),
        (ParallelConfig(ep=2, device="cuda"), [{"CPU": 4.0}], "2 GPU in all.*4 CPU, 0 GPU"),
        (ParallelConfig(ep=2), [{"CPU": 8.0, "GPU": 1.0}], "cannot hold 2 shards of 1 CPU and 1 GPU each"),
        (ParallelConfig(ep=3, cpus_per_shard=3), [{"CPU": 4.0}, {"CPU": 5.0}], "4 CPU; 5 CPU"),
    ],
    ids=["cpus", "no gpu", "one gpu for two", "fragments"],
)
def test_a_cluster_that_is_too_small_is_refused_with_what_it_has(parallel, nodes, message):
    with pytest.raises(ConfigError, match=message):
        plan_placement(parallel, nodes)
