"""An expert host as its routers and its controller see it, over connections inside the process."""

import dataclasses

import numpy as np
import pytest
import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.errors import ConnectionLostError
from dsmoe_ray.serving.control import HostOrders
from dsmoe_ray.serving.plan import LogicalExpert
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.expert_codec import call_to_frame
from dsmoe_ray.serving.wire.messages import ExpertRefusal, ExpertResult, PlanMessage
from tests.fakes.host_calls import ALL, ANSWER_S, ask, connect, make_call, make_plan, receive, running_host
from tests.fakes.tiny_artifact import write_tiny_artifact

FIRST = [LogicalExpert(0, expert_id) for expert_id in (0, 1)]
ORDERS = HostOrders(hold=frozenset(FIRST), plan=make_plan(7, dict.fromkeys(FIRST, ("here",))))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_artifact(tmp_path_factory.mktemp("tiny") / "artifact")


@pytest.fixture
def host(directory):
    with running_host(directory) as host:
        yield host


@pytest.fixture
def connection(host):
    return connect(host)


def apply(host, orders):
    host.apply(orders)
    assert host.wait_until_loaded(ANSWER_S)


def test_a_host_holds_what_it_is_ordered_to_and_says_so(host):
    apply(host, ORDERS)
    report = host.report()
    assert report.held == frozenset(FIRST)
    assert (report.plan_version, report.plan, report.failures) == (7, None, {})
    apply(host, dataclasses.replace(ORDERS, plan=make_plan(6, {}), send_plan=True))
    assert host.report().plan == ORDERS.plan


def test_a_call_is_answered_and_counted(host, connection):
    apply(host, ORDERS)
    result = ask(connection, make_call(0, 5, expert_ids=[0, 1], plan_version=7, call_id=31))
    assert isinstance(result, ExpertResult)
    assert (result.call_id, result.y.shape) == (31, (10, 16))
    assert host.report().num_tokens == {FIRST[0]: 5, FIRST[1]: 5}
    assert host.report().busy_s > 0.0
    assert host.counts.num_cold == 0


def test_a_call_for_experts_of_other_hosts_is_refused_with_the_plan_that_says_so(host, connection):
    apply(host, ORDERS)
    plan, refusal = ask(connection, make_call(0, expert_ids=[1, 2], plan_version=3, call_id=8)), receive(connection)
    assert plan == PlanMessage(plan=ORDERS.plan)
    assert (refusal.call_id, refusal.reason, refusal.missing) == (8, "not_held", (2,))
    assert "experts 2 of layer 0" in refusal.message
    # The plan is on its way already: it is not sent again.
    assert isinstance(ask(connection, make_call(0, expert_ids=[1, 2], plan_version=3)), ExpertRefusal)
    assert host.report().held == frozenset(FIRST)


@pytest.mark.parametrize("why", ["no plan", "newer plan", "on demand", "cold", "planned"])
def test_an_expert_that_is_not_here_is_read_when_a_token_has_nowhere_else_to_go(directory, why):
    planned = make_plan(7, {ALL[7]: ("here",)}) if why == "planned" else ORDERS.plan
    orders = {
        "no plan": HostOrders(hold=frozenset(FIRST)),
        "cold": dataclasses.replace(ORDERS, may_hold=frozenset([ALL[7]])),
    }.get(why, dataclasses.replace(ORDERS, plan=planned))
    fields = {"newer plan": {"plan_version": 8}, "on demand": {"on_demand": True, "plan_version": 7}}
    with running_host(directory) as host:
        apply(host, orders)
        call = make_call(1, expert_ids=[3], **fields.get(why, {"plan_version": 7}))
        assert isinstance(ask(connect(host), call), ExpertResult)
        assert host.report().held == {*FIRST, ALL[7]}
        assert host.counts.num_cold == 1


def test_what_nobody_ordered_is_let_go_once_nobody_has_used_it_for_long(directory):
    with running_host(directory, linger_s=0.0) as host:
        apply(host, HostOrders(hold=frozenset(FIRST)))
        assert isinstance(ask(connect(host), make_call(1, expert_ids=[3])), ExpertResult)
        assert ALL[7] in host.report().held
        apply(host, HostOrders(hold=frozenset(FIRST[:1])))
        assert host.report().held == {FIRST[0]}


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_a_model_larger_than_the_memory_is_served_whole(directory, exact):
    with running_host(directory) as large:
        expert_bytes = large.report().info.memory_bytes // len(ALL)
        calls = [make_call(layer, 9, exact=exact, seed=layer) for layer in (0, 1, 0)]
        expected = [ask(connect(large), call).y for call in calls]
    with running_host(directory, memory_bytes=2 * expert_bytes) as host:
        connection = connect(host)
        for call, y in zip(calls, expected, strict=True):
            found = ask(connection, call).y
            # Sums of up to three parts in another order.
            np.testing.assert_allclose(found, y, rtol=0.0 if exact else 1e-6, atol=0.0 if exact else 1e-6)
            assert len(host.report().held) <= 2


def test_orders_beyond_the_memory_are_reported_and_leave_the_rest_in_place(directory):
    with running_host(directory) as large:
        expert_bytes = large.report().info.memory_bytes // len(ALL)
    with running_host(directory, memory_bytes=2 * expert_bytes) as host:
        apply(host, HostOrders(hold=frozenset(ALL[:3])))
        report = host.report()
        assert len(report.held) == 2
        assert set(report.failures) == set(ALL[:3]) - report.held
        assert "memory_bytes" in next(iter(report.failures.values()))


def test_a_call_that_comes_too_late_is_not_answered(host, connection):
    apply(host, ORDERS)
    connection.send(call_to_frame(make_call(expert_ids=[0], deadline_ms=0, call_id=1)))
    connection.send(call_to_frame(make_call(expert_ids=[3], layer=1, deadline_ms=0, on_demand=True, call_id=2)))
    assert isinstance(receive(connection), PlanMessage)
    assert ask(connection, make_call(expert_ids=[0], plan_version=7, call_id=3)).call_id == 3
    assert host.counts.num_late == 2
    assert host.report().held == frozenset(FIRST)


def test_a_call_that_makes_no_sense_is_refused_and_the_next_one_answered(host, connection, caplog):
    apply(host, HostOrders(hold=frozenset(FIRST)))
    wrong = {"layer": {"layer": 2}, "K": {"expert_ids": [0, 1, 2, 3, 3]}, "ascend": {"expert_ids": [1, 0]}}
    for call_id, (word, fields) in enumerate(wrong.items()):
        refusal = ask(connection, make_call(**{"expert_ids": [0], "call_id": call_id, **fields}))
        assert (refusal.reason, refusal.call_id) == ("failed", call_id)
        assert word in refusal.message
    assert isinstance(ask(connection, make_call(expert_ids=[0])), ExpertResult)
    assert len([record for record in caplog.records if "cannot be computed" in record.message]) == 1


@pytest.mark.parametrize(
    "wrong", [Frame(99, {}), Frame(1, {}), Frame(1, {}, [b"short"])], ids=["kind", "empty", "short"]
)
def test_a_frame_that_is_no_call_ends_its_connection_only(host, connection, wrong):
    other = connect(host)
    connection.send(wrong)
    with pytest.raises(ConnectionLostError):
        connection.receive(ANSWER_S)
    assert isinstance(ask(other, make_call(expert_ids=[0])), ExpertResult)


def test_a_damaged_expert_fails_its_calls_and_no_others(tmp_path, caplog):
    directory = write_tiny_artifact(tmp_path / "artifact")
    [weights] = directory.glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    w2_FD = load_artifact(directory).load_experts(1, [3])[3]["w2"]
    data[data.index(w2_FD.numpy().tobytes())] ^= 1
    weights.write_bytes(bytes(data))
    with running_host(directory) as host:
        apply(host, HostOrders(hold=frozenset(ALL)))
        report = host.report()
        assert set(report.failures) == {ALL[7]}
        assert "blocks.1.ffn.experts.w2.00003" in report.failures[ALL[7]]
        connection = connect(host)
        refusal = ask(connection, make_call(1, expert_ids=[2, 3]))
        assert (refusal.reason, "SHA-256" in refusal.message) == ("failed", True)
        assert isinstance(ask(connection, make_call(1, expert_ids=[2])), ExpertResult)


def test_a_host_that_leaves_goes_on_until_nobody_needs_it(host, connection):
    apply(host, ORDERS)
    host.leave()
    assert host.report().leaving
    assert not host.wait_until_unneeded(0.0)
    assert isinstance(ask(connection, make_call(expert_ids=[0], plan_version=7)), ExpertResult)
    apply(host, HostOrders(hold=frozenset(), may_leave=True))
    assert host.wait_until_unneeded(0.0)


def test_bfloat16_calls_are_answered_in_their_type(directory):
    with running_host(directory, dtype=torch.bfloat16) as host:
        connection = connect(host)
        sums = ask(connection, make_call(1, 6, exact=False, dtype="bfloat16")).y
        rows = ask(connection, make_call(1, 6, exact=True, dtype="bfloat16")).y
        assert (sums.dtype, rows.dtype) == (np.uint16, np.float32)
        call = make_call(1, 6)
        added_TD = torch.zeros(6, 16)
        tokens = np.nonzero(call.expert_ids_TK >= 0)[0]
        added_TD.index_add_(0, torch.from_numpy(tokens), torch.from_numpy(rows.copy()))
        assert torch.equal(added_TD.bfloat16(), torch.from_numpy(sums.copy()).view(torch.bfloat16))
