"""Which replica a call goes to."""

from hypothesis import given
from hypothesis import strategies as st

from dsmoe_ray.serving.plan import LogicalExpert
from dsmoe_ray.serving.replica_choice import HostLoad, choose_refuge, choose_replicas, compute_work

IDLE = HostLoad(outstanding=0, seconds_per_work=1e-5)


def hold_all(num_experts, *hosts):
    return {expert_id: list(hosts) for expert_id in range(num_experts)}


def test_the_only_replica_is_chosen_whatever_its_load():
    busy = HostLoad(outstanding=1e6, seconds_per_work=1.0)
    assert choose_replicas({3: 5}, {3: ["a"]}, {"a": busy, "b": IDLE}) == {3: "a"}


def test_the_host_with_less_outstanding_work_is_chosen():
    loads = {"a": HostLoad(outstanding=100, seconds_per_work=1e-5), "b": IDLE}
    assert choose_replicas({3: 5}, {3: ["a", "b"]}, loads) == {3: "b"}


def test_a_slow_host_gets_less():
    loads = {"fast": IDLE, "slow": HostLoad(outstanding=0, seconds_per_work=3e-5)}
    chosen = choose_replicas(dict.fromkeys(range(8), 4), hold_all(8, "fast", "slow"), loads)
    assert list(chosen.values()).count("fast") == 6


def test_a_distant_host_is_chosen_only_for_more_than_its_distance():
    loads = {"far": HostLoad(outstanding=0, seconds_per_work=1e-5, distance_s=3e-4), "near": IDLE}
    assert set(choose_replicas({0: 1, 1: 1}, hold_all(2, "far", "near"), loads).values()) == {"near"}
    many = choose_replicas(dict.fromkeys(range(20), 10), hold_all(20, "far", "near"), loads)
    assert set(many.values()) == {"far", "near"}


@given(
    st.dictionaries(st.integers(0, 30), st.integers(1, 50), min_size=1, max_size=12),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_every_expert_goes_to_one_of_its_holders_and_no_host_has_twice_the_least_it_could(counts, num_hosts, random):
    hosts = [f"h{index}" for index in range(num_hosts)]
    holders = {expert_id: random.sample(hosts, random.randint(1, num_hosts)) for expert_id in counts}
    chosen = choose_replicas(counts, holders, dict.fromkeys(hosts, IDLE))
    assert set(chosen) == set(counts)
    assert all(host in holders[expert_id] for expert_id, host in chosen.items())
    everywhere = choose_replicas(counts, {expert_id: hosts for expert_id in counts}, dict.fromkeys(hosts, IDLE))
    loads = [sum(compute_work(counts[e]) for e, host in everywhere.items() if host == one) for one in hosts]
    # Longest first is within 4/3 of the best, which is at least the mean and the largest expert.
    best = max(sum(map(compute_work, counts.values())) / num_hosts, *map(compute_work, counts.values()))
    assert max(loads) <= 2 * best


def test_a_refuge_depends_on_the_expert_and_not_on_the_order_of_hosts():
    hosts = [f"h{index}" for index in range(8)]
    refuges = [choose_refuge(LogicalExpert(2, expert_id), hosts) for expert_id in range(64)]
    assert refuges == [choose_refuge(LogicalExpert(2, expert_id), hosts[::-1]) for expert_id in range(64)]
    assert len(set(refuges)) == 8
    without = [host for host in hosts if host != refuges[0]]
    moved = [choose_refuge(LogicalExpert(2, expert_id), without) for expert_id in range(64)]
    assert all(new == old for new, old in zip(moved, refuges, strict=True) if old != refuges[0])
