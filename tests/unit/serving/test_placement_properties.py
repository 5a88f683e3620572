"""What holds for every placement, whatever the loads, the hosts and the plan before."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.serving.demand import ExpertDemand, index_experts
from dsmoe_ray.serving.placement import Placement, plan_placement
from dsmoe_ray.serving.plan import HostInfo, PlacementPlan

NUM_LAYERS, NUM_EXPERTS = 2, 5
EXPERTS = index_experts(NUM_LAYERS, NUM_EXPERTS)
ROOMY = 1_000_000

counts = st.lists(st.integers(0, 4), min_size=len(EXPERTS), max_size=len(EXPERTS))
loads = st.lists(st.floats(0, 1000), min_size=len(EXPERTS), max_size=len(EXPERTS))
sizes = st.one_of(st.just([10] * len(EXPERTS)), st.lists(st.integers(1, 20), min_size=10, max_size=10))
clusters = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0, 15, 40, 100])), min_size=0, max_size=6)


def make_demand(replicas, values) -> ExpertDemand:
    return ExpertDemand(
        experts=EXPERTS,
        replicas_E=np.array(replicas),
        loads_E=np.array(values, dtype=np.float64),
        load_errors_E=np.zeros(len(EXPERTS)),
    )


def make_hosts(cluster, *, first=0, memory_bytes=None) -> dict[str, HostInfo]:
    return {
        f"h{number}": HostInfo(
            host_id=f"h{number}", addresses=(), node_id=f"n{node}", memory_bytes=memory_bytes or memory
        )
        for number, (node, memory) in enumerate(cluster, start=first)
    }


def check(placement: Placement, demand: ExpertDemand, hosts: dict[str, HostInfo], size_list: list[int]) -> None:
    plan = placement.plan
    assert dict(plan.hosts) == hosts
    used = Counter()
    for expert, size, wanted in zip(EXPERTS, size_list, demand.replicas_E, strict=True):
        host_ids = plan.replicas.get(expert, ())
        assert set(host_ids) <= set(hosts)
        assert len(set(host_ids)) == len(host_ids)
        assert bool(host_ids) == bool(hosts)
        if expert in plan.cold:
            assert len(host_ids) == 1
            assert wanted == 0 or expert in placement.lacking
        else:
            assert len(host_ids) <= wanted
            used.update(dict.fromkeys(host_ids, size))
    for host_id, host in hosts.items():
        held = [e for e in EXPERTS if host_id in plan.replicas.get(e, ()) and e not in plan.cold]
        total = sum(size_list[EXPERTS.index(expert)] for expert in held)
        assert total <= host.memory_bytes


@settings(max_examples=80, deadline=None)
@given(counts, loads, sizes, clusters)
def test_limits_are_kept_and_every_expert_has_one_place_while_there_is_a_host(replicas, values, size_list, cluster):
    demand, hosts = make_demand(replicas, values), make_hosts(cluster)
    placement = plan_placement(demand, hosts, None, expert_bytes=np.array(size_list))
    check(placement, demand, hosts, size_list)


@settings(max_examples=80, deadline=None)
@given(counts, loads, counts, loads, sizes, clusters, clusters, st.integers(0, 6))
def test_the_same_holds_after_any_change(before, loads_before, after, loads_after, size_list, old, new, shift):
    expert_bytes = np.array(size_list)
    first = plan_placement(make_demand(before, loads_before), make_hosts(old), None, expert_bytes=expert_bytes)
    demand, hosts = make_demand(after, loads_after), make_hosts(new, first=shift)
    second = plan_placement(demand, hosts, first.plan, expert_bytes=expert_bytes)
    check(second, demand, hosts, size_list)
    told = {(event.expert, host_id) for event in second.events for host_id in event.added}
    assert len(told) == second.num_loads
    warm_before = {(e, h) for e, ids in first.plan.replicas.items() if e not in first.plan.cold for h in ids}
    warm_after = {(e, h) for e, ids in second.plan.replicas.items() if e not in second.plan.cold for h in ids}
    assert warm_after - warm_before == told


@settings(max_examples=80, deadline=None)
@given(counts, loads, clusters, clusters)
def test_nothing_moves_when_nothing_changed(replicas, values, old, new):
    demand, hosts = make_demand(replicas, values), make_hosts(new)
    start = plan_placement(make_demand([1] * len(EXPERTS), values[::-1]), make_hosts(old), None, expert_bytes=10)
    first = plan_placement(demand, hosts, start.plan, expert_bytes=10)
    second = plan_placement(demand, hosts, first.plan, expert_bytes=10)
    assert second.plan is first.plan
    assert second.num_loads == 0


@settings(max_examples=80, deadline=None)
@given(counts, loads, clusters.filter(bool), clusters.filter(bool))
def test_with_memory_every_wish_is_met_and_replicas_lie_on_as_many_nodes_as_there_are(replicas, values, old, new):
    start = plan_placement(
        make_demand(replicas[::-1], values), make_hosts(old, memory_bytes=ROOMY), None, expert_bytes=10
    )
    hosts = make_hosts(new, memory_bytes=ROOMY)
    plan: PlacementPlan = plan_placement(make_demand(replicas, values), hosts, start.plan, expert_bytes=10).plan
    num_nodes = len({host.node_id for host in hosts.values()})
    for expert, wanted in zip(EXPERTS, replicas, strict=True):
        placed = plan.hosts_of(expert)
        expected = min(wanted, len(hosts))
        assert (0 if expert in plan.cold else len(placed)) == expected
        if expected:
            assert len({host.node_id for host in placed}) == min(expected, num_nodes)


@settings(max_examples=50, deadline=None)
@given(counts, loads, clusters)
def test_the_order_in_which_hosts_are_named_does_not_matter(replicas, values, cluster):
    demand, hosts = make_demand(replicas, values), make_hosts(cluster)
    turned = dict(reversed(hosts.items()))
    plans = [plan_placement(demand, some, None, expert_bytes=10).plan for some in (hosts, turned)]
    assert plans[0] == plans[1]
