"""The published rule, and our placement against it on the same loads, replicas and slots."""

import numpy as np
import pytest

from dsmoe_ray.serving.eplb import pack_evenly, plan_eplb, replicate


def test_slots_beyond_one_each_go_where_a_replica_bears_most():
    # 90/2 = 45 is still more than 40, which is more than 30.
    assert replicate(np.array([90.0, 40.0, 10.0]), 3).tolist() == [1, 1, 1]
    assert replicate(np.array([90.0, 40.0, 10.0]), 5).tolist() == [3, 1, 1]
    assert replicate(np.array([90.0, 40.0, 10.0]), 6).tolist() == [3, 2, 1]
    with pytest.raises(ValueError, match="2 slots"):
        replicate(np.ones(3), 2)


def test_packs_are_equally_many_the_heaviest_item_first():
    packs = pack_evenly(np.array([5.0, 9.0, 1.0, 2.0, 3.0, 4.0]), 2)
    assert packs.tolist() == [1, 0, 0, 1, 0, 1]
    assert np.bincount(packs).tolist() == [3, 3]


def test_groups_stay_on_one_node():
    rng = np.random.default_rng(0)
    loads_LE = rng.lognormal(size=(3, 16))
    placed = plan_eplb(loads_LE, num_slots=24, num_hosts=8, num_groups=4, num_nodes=2)
    for expert_ids_R, hosts_R, counts_E in zip(placed.expert_ids_LR, placed.hosts_LR, placed.counts_LE, strict=True):
        assert np.bincount(expert_ids_R, minlength=16).tolist() == counts_E.tolist()
        assert np.bincount(hosts_R, minlength=8).tolist() == [3] * 8
        for group in range(4):
            assert len({node for node in hosts_R[expert_ids_R // 4 == group] // 4}) == 1
