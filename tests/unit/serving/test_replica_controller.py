import pytest

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.plan import LogicalExpert
from dsmoe_ray.serving.replica_controller import FIRST_WAIT_S, STALLED_AFTER_S
from tests.fakes.fake_fleet import EXPERT_BYTES, INTERVAL_S, FakeRouter, make_fleet

HOT = LogicalExpert(1, 2)
LONG_TURNS = 40
"""Enough for all to be taken for dead together."""


@pytest.fixture
def fleet():
    fleet = make_fleet()
    fleet.settle()
    return fleet


def replicas_of(fleet):
    return {expert: set(host_ids) for expert, host_ids in fleet.controller.plan.replicas.items()}


def all_held(fleet):
    return {host_id: set(host.held) for host_id, host in fleet.hosts.items()}


def holdings(fleet):
    return {host_id: set(fleet.controller.plan.held_by(host_id)) for host_id in fleet.hosts}


def test_the_first_plan_waits_for_the_hosts_that_are_to_come():
    fleet = make_fleet(num_hosts=3)
    fleet.hosts["host-2"].is_silent = True
    fleet.turn(4)
    assert fleet.controller.plan.version == 0 and fleet.sync_gateway().routers is None
    fleet.hosts["host-2"].is_silent = False
    fleet.turn(1)
    assert fleet.controller.plan.version == 1
    assert {host_id for host_ids in fleet.controller.plan.replicas.values() for host_id in host_ids} == set(fleet.hosts)


def test_the_first_plan_does_not_wait_for_ever():
    fleet = make_fleet(num_hosts=3)
    fleet.hosts["host-2"].is_silent = True
    fleet.turn(int(FIRST_WAIT_S / INTERVAL_S) + 2)
    assert set(fleet.controller.plan.hosts) == {"host-0", "host-1"}


def test_hosts_hold_what_the_plan_says_and_everyone_learns_it(fleet):
    assert all_held(fleet) == holdings(fleet)
    assert sorted(map(len, all_held(fleet).values())) == [4, 4]
    versions = {host.plan.version for host in fleet.hosts.values()} | {fleet.routers["router"].plan.version}
    assert versions == {fleet.controller.plan.version}
    orders = fleet.sync_gateway()
    assert [router.router_id for router in orders.routers] == ["router"] and orders.unready_reason is None


def test_nothing_changes_where_nothing_happens(fleet):
    version, num_events = fleet.controller.plan.version, len(fleet.controller.list_events())
    fleet.turn(40)
    assert fleet.controller.plan.version == version
    assert len(fleet.controller.list_events()) == num_events


def test_only_hot_experts_get_replicas_within_seconds_and_lose_them_after_the_delay(fleet):
    fleet.load = {HOT: 150.0}
    before_s = fleet.clock()
    while len(replicas_of(fleet)[HOT]) == 1:
        fleet.turn()
    assert fleet.clock() - before_s <= 5.0
    fleet.turn(20)
    assert {expert for expert, host_ids in replicas_of(fleet).items() if len(host_ids) > 1} == {HOT}
    assert all_held(fleet) == holdings(fleet)
    fleet.load = {}
    stopped_s = fleet.clock()
    while len(replicas_of(fleet)[HOT]) > 1:
        fleet.turn()
    assert 5.0 <= fleet.clock() - stopped_s <= 10.0
    fleet.turn(4)
    assert all_held(fleet) == holdings(fleet)


def test_an_event_says_which_expert_from_how_many_to_how_many_where_and_why(fleet):
    fleet.load = {HOT: 150.0}
    fleet.turn(20)
    changes = [event.change for event in fleet.controller.list_events() if event.change is not None]
    change = next(change for change in changes if change.cause == "load")
    assert (change.expert, change.from_replicas, change.to_replicas, len(change.added)) == (HOT, 1, 2, 1)
    assert change.numbers["tokens_per_s"] > 100
    assert "1/2: 1 -> 2" in str(change)


def test_a_replica_is_published_only_when_its_host_has_loaded_it(fleet):
    other = next(host for host in fleet.hosts.values() if HOT not in host.held)
    other.loads = False
    fleet.load = {HOT: 150.0}
    fleet.turn(20)
    assert len(replicas_of(fleet)[HOT]) == 1
    assert fleet.controller.describe().missing == ((HOT, other.host_id),)
    other.loads = True
    fleet.turn(3)
    assert len(replicas_of(fleet)[HOT]) == 2


def test_a_rebalance_that_stalls_is_reported_with_the_host_and_its_reason(fleet):
    other = next(host for host in fleet.hosts.values() if HOT not in host.held)
    other.loads = False
    fleet.load = {HOT: 150.0}
    fleet.turn(int(STALLED_AFTER_S / INTERVAL_S) + 20)
    stalled = [event for event in fleet.controller.list_events() if event.kind == "stalled"]
    assert len(stalled) == 1
    assert other.host_id in stalled[0].message and "1/2" in stalled[0].message
    assert "the disk is on fire" in stalled[0].message


def test_a_host_keeps_an_expert_until_no_router_follows_a_plan_that_has_it(fleet):
    fleet.load = {HOT: 150.0}
    fleet.turn(20)
    fleet.routers["slow"] = FakeRouter("slow", plan=fleet.controller.plan, is_deaf=True)
    fleet.load = {}
    fleet.turn(40)
    assert len(replicas_of(fleet)[HOT]) == 1
    assert all(HOT in host.held for host in fleet.hosts.values())
    fleet.routers["slow"].is_deaf = False
    fleet.turn(3)
    assert all_held(fleet) == holdings(fleet)


def test_a_silent_host_is_lost_and_its_experts_are_published_elsewhere_at_once(fleet):
    fleet.hosts["host-0"].is_silent = True
    before_s = fleet.clock()
    while "host-0" in fleet.controller.plan.hosts:
        fleet.turn()
    assert fleet.clock() - before_s <= 2.0
    assert set(replicas_of(fleet)[HOT]) == {"host-1"}
    fleet.turn(2)
    assert fleet.hosts["host-1"].held == set(fleet.experts)
    assert "host_lost" in fleet.kinds()


def test_a_host_that_a_router_suspects_is_lost_sooner(fleet):
    fleet.hosts["host-0"].is_silent = True
    fleet.routers["router"].suspected = {"host-0": "lost"}
    fleet.turn(3)
    assert "host-0" not in fleet.controller.plan.hosts


def test_a_host_that_reports_but_cannot_be_reached_is_relieved_of_its_experts(fleet):
    fleet.load = dict.fromkeys(fleet.experts, 60.0)
    fleet.routers["router"].suspected = {"host-0": "lost"}
    fleet.turn(3)
    assert "host-0" in fleet.controller.plan.hosts
    fleet.turn(10)
    assert set().union(*replicas_of(fleet).values()) == {"host-1"}
    fleet.routers["router"].suspected = {}
    fleet.settle()
    assert "host-0" in set().union(*replicas_of(fleet).values())


def test_a_new_host_takes_its_share(fleet):
    fleet.load = dict.fromkeys(fleet.experts, 60.0)
    fleet.turn(8)
    fleet.add_host("host-2")
    fleet.settle()
    assert len(fleet.hosts["host-2"].held) >= 2


def test_a_host_that_leaves_may_go_when_its_experts_are_held_elsewhere(fleet):
    leaving = fleet.hosts["host-0"]
    leaving.is_leaving = True
    fleet.hosts["host-1"].loads = False
    fleet.turn(8)
    assert not leaving.may_leave and len(leaving.held) == 4
    fleet.hosts["host-1"].loads = True
    fleet.turn(6)
    assert leaving.may_leave and not leaving.held
    assert "host-0" not in fleet.controller.plan.hosts


def test_a_controller_that_slept_takes_nobody_for_dead(fleet):
    fleet.clock.advance(60.0)
    fleet.controller.step()
    assert set(fleet.controller.plan.hosts) == set(fleet.hosts)
    assert fleet.sync_gateway().routers


@pytest.mark.parametrize("loses_a_host", [False, True], ids=["all-there", "one-dead"])
def test_a_new_controller_goes_on_from_what_reports_say_and_moves_nothing(fleet, loses_a_host):
    fleet.load = {HOT: 150.0}
    fleet.turn(20)
    plan, held = fleet.controller.plan, all_held(fleet)
    fleet.restart_controller()
    fleet.hosts["host-1"].is_silent = loses_a_host
    fleet.turn(1)
    assert fleet.sync_gateway().routers is None
    assert all_held(fleet) == held
    fleet.turn(10)
    now = fleet.controller.plan
    assert now.version > plan.version
    assert "rebuilt" in fleet.kinds()
    if loses_a_host:
        assert set(now.hosts) == {"host-0"} and fleet.hosts["host-0"].held == set(fleet.experts)
    else:
        assert (now.replicas, now.hosts) == (plan.replicas, plan.hosts)
        assert all_held(fleet) == held
    assert fleet.routers["router"].plan.version == fleet.controller.plan.version


def test_a_new_controller_does_not_take_old_tokens_for_load(fleet):
    fleet.load = {HOT: 80.0}
    fleet.turn(80)
    fleet.load = {}
    fleet.restart_controller()
    fleet.turn(20)
    assert not any(event.change for event in fleet.controller.list_events())


def test_a_newer_plan_from_elsewhere_is_outbid(fleet):
    fleet.routers["stranger"] = FakeRouter("stranger", plan=fleet.controller.plan.__class__(version=99))
    fleet.turn(2)
    assert fleet.controller.plan.version == 100
    assert fleet.routers["stranger"].plan.replicas == fleet.controller.plan.replicas


def test_cold_experts_are_held_only_when_a_token_wants_them():
    fleet = make_fleet(min_replicas=0)
    fleet.settle()
    assert fleet.controller.plan.cold == set(fleet.experts)
    assert not any(host.held for host in fleet.hosts.values())
    fleet.load = {HOT: 20.0}
    fleet.turn(4)
    assert fleet.controller.plan.cold == set(fleet.experts) - {HOT}
    assert sum(HOT in host.held for host in fleet.hosts.values()) == 1
    fleet.load = {}
    fleet.turn(80)
    assert HOT in fleet.controller.plan.cold


def test_hosts_full_to_the_brim_exchange_experts():
    fleet = make_fleet()
    for host in fleet.hosts.values():
        host.memory_bytes = 4 * EXPERT_BYTES
    fleet.settle()
    first = next(expert for expert in fleet.experts if expert in fleet.hosts["host-0"].held)
    second = next(expert for expert in fleet.experts if expert in fleet.hosts["host-1"].held)
    fleet.controller.rollback(fleet.controller.plan.version)
    swapped = {**fleet.controller.plan.replicas, first: ("host-1",), second: ("host-0",)}
    fleet.controller._target = fleet.controller.plan.__class__(
        version=7, hosts=fleet.controller.plan.hosts, replicas=swapped
    )
    fleet.turn(6)
    assert fleet.controller.plan.replicas == swapped
    assert all_held(fleet) == holdings(fleet)


def test_a_pin_holds_whatever_the_load_and_outlives_the_controller(fleet):
    fleet.controller.pin(HOT, 2)
    fleet.turn(4)
    assert len(replicas_of(fleet)[HOT]) == 2
    fleet.restart_controller()
    fleet.turn(60)
    assert len(replicas_of(fleet)[HOT]) == 2
    fleet.controller.unpin(HOT)
    fleet.turn(40)
    assert len(replicas_of(fleet)[HOT]) == 1


def test_a_rollback_brings_an_earlier_plan_back_and_keeps_it(fleet):
    before = fleet.controller.plan
    fleet.load = {HOT: 150.0}
    fleet.turn(20)
    fleet.controller.rollback(before.version)
    fleet.turn(60)
    assert fleet.controller.plan.replicas == before.replicas
    assert all_held(fleet) == holdings(fleet)
    fleet.controller.resume()
    fleet.turn(20)
    assert len(replicas_of(fleet)[HOT]) == 2


def test_a_lost_host_is_made_good_even_while_nothing_is_scaled(fleet):
    fleet.controller.rollback(fleet.controller.plan.version)
    fleet.hosts["host-0"].is_silent = True
    fleet.turn(12)
    assert set().union(*replicas_of(fleet).values()) == {"host-1"}


def test_wishes_that_cannot_be_met_are_refused(fleet):
    with pytest.raises(ConfigError, match="no expert 9/9"):
        fleet.controller.pin(LogicalExpert(9, 9), 1)
    with pytest.raises(ConfigError, match="not pinned"):
        fleet.controller.unpin(HOT)
    with pytest.raises(ConfigError, match="no plan 77"):
        fleet.controller.rollback(77)


def test_a_dry_run_tells_what_would_change_and_changes_nothing():
    fleet = make_fleet(upscale_delay_s=1000.0)
    fleet.settle()
    fleet.load = {HOT: 150.0}
    fleet.turn(20)
    before = fleet.controller.plan
    status = fleet.controller.describe()
    assert any("1/2: 1 -> 2" in line for line in status.forecast)
    assert status.loads[HOT] == pytest.approx(150, rel=0.05)
    fleet.turn(8)
    assert fleet.controller.plan is before


def test_a_gateway_hears_of_living_routers_and_what_is_missing(fleet):
    fleet.routers["second"] = FakeRouter("second")
    fleet.turn()
    assert {router.router_id for router in fleet.sync_gateway().routers} == {"router", "second"}
    fleet.routers["second"].is_silent = True
    fleet.sync_gateway(lost_routers=frozenset({"second"}))
    fleet.turn(3)
    assert [router.router_id for router in fleet.sync_gateway().routers] == ["router"]
    fleet.routers["router"].is_silent = True
    fleet.turn(LONG_TURNS)
    assert "no router" in fleet.sync_gateway().unready_reason
    for host in fleet.hosts.values():
        host.is_silent = True
    fleet.turn(LONG_TURNS)
    assert "no expert host" in fleet.sync_gateway().unready_reason


def test_where_nobody_reports_any_more_the_last_plan_stays(fleet):
    plan = fleet.controller.plan
    for process in (*fleet.hosts.values(), *fleet.routers.values()):
        process.is_silent = True
    fleet.turn(16)
    assert fleet.sync_gateway().routers and "host_lost" not in fleet.kinds()
    fleet.turn(LONG_TURNS)
    assert fleet.controller.plan is plan and fleet.kinds().count("host_lost") == 2
    for process in (*fleet.hosts.values(), *fleet.routers.values()):
        process.is_silent = False
    fleet.settle()
    assert fleet.controller.plan.replicas == plan.replicas
