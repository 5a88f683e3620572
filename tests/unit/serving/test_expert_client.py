"""A router's side of expert calls, against hosts that do what a test tells them."""

import threading

import numpy as np
import pytest
import torch

from dsmoe_ray.errors import ConfigError, ConnectionLostError, ExpertUnavailableError
from dsmoe_ray.serving.config import WireConfig
from dsmoe_ray.serving.expert_client import RemoteExperts
from dsmoe_ray.serving.host_links import build_connect
from dsmoe_ray.serving.wire.handshake import Hello
from tests.fakes.fake_expert_host import (
    D_MODEL,
    MODEL,
    NUM_EXPERTS,
    SECRET,
    FakeExpertHost,
    answer,
    compute_sums,
    hang,
    lose,
    make_plan,
    make_tokens,
    push,
    refuse,
)

# A host that hangs is given up soon; nothing else here takes long.
WIRE = WireConfig(expert_deadline_s=0.1, request_deadline_s=20.0)


class Stage:
    """Hosts, a client of them, and what it sent."""

    def __init__(self):
        self.hosts, self.clients, self.sent = [], [], []
        self.on_sent = lambda: None

    def note(self, piece):
        self.sent.append(piece)
        self.on_sent()

    def host(self, *arguments, **options):
        self.hosts.append(FakeExpertHost(*arguments, **options))
        return self.hosts[-1]

    def client(self, plan, *, exact=True, wire=WIRE, connect=None):
        hello = Hello(role="router", model_digest=MODEL)
        connect = connect or build_connect(hello, secret=SECRET, node_id="here", wire=wire)
        client = RemoteExperts(
            plan,
            num_experts=NUM_EXPERTS,
            exact=exact,
            connect=connect,
            node_id="here",
            wire=wire,
            audit=self.note,
        )
        self.clients.append(client)
        client.wait_until_connected(10.0)
        return client

    def close(self):
        for client in self.clients:
            client.close()
        for host in self.hosts:
            host.stop()


@pytest.fixture
def stage():
    made = Stage()
    yield made
    made.close()


def split_holders(*hosts):
    return [[hosts[expert_id % len(hosts)]] for expert_id in range(NUM_EXPERTS)]


def run(client, *, layer=1, num_tokens=23, seed=0):
    x_TD, assignment = make_tokens(num_tokens, seed=seed)
    return client.combine(client.dispatch(layer, x_TD, assignment))


def expect(*, layer=1, num_tokens=23, seed=0):
    x_TD, (ids_TK, gates_TK, _) = make_tokens(num_tokens, seed=seed)
    return torch.from_numpy(compute_sums(layer, x_TD.numpy(), ids_TK.numpy(), gates_TK.numpy()))


def hosts_of_each_token(sent):
    """Return, for each token row, the experts that were sent where."""
    found = {}
    for piece in sent:
        for row, ids in zip(piece.token_rows.tolist(), piece.expert_ids_TK.tolist(), strict=True):
            found.setdefault(row, []).extend((expert_id, piece.host_id) for expert_id in ids if expert_id >= 0)
    return {row: sorted(pairs) for row, pairs in found.items()}


def test_tokens_go_once_to_each_host_that_holds_an_expert_of_theirs(stage):
    first, second, third = (stage.host(name) for name in "abc")
    client = stage.client(make_plan(1, split_holders(first, second, third), stage.hosts))
    assert torch.equal(run(client), expect())
    x_TD, (ids_TK, _, _) = make_tokens(23)
    wanted = {
        row: [(expert_id, "abc"[expert_id % 3]) for expert_id in ids if expert_id >= 0]
        for row, ids in enumerate(ids_TK.tolist())
    }
    assert hosts_of_each_token(stage.sent) == {row: pairs for row, pairs in wanted.items() if pairs}
    for host in stage.hosts:
        [call] = host.calls
        [piece] = [piece for piece in stage.sent if piece.host_id == host.host_id]
        assert len(set(piece.token_rows.tolist())) == len(call.x_TD)
        assert np.array_equal(call.x_TD, x_TD.numpy()[piece.token_rows])
        assert (call.layer, call.plan_version, call.exact, call.on_demand) == (1, 1, True, False)


def test_sums_of_hosts_are_close_and_rows_are_exact(stage):
    hosts = [stage.host(name) for name in "abc"]
    plan = make_plan(1, split_holders(*hosts), stage.hosts)
    # Four float32 terms of some ten in another order.
    torch.testing.assert_close(run(stage.client(plan, exact=False)), expect(), rtol=1e-6, atol=1e-5)
    for seed in range(5):
        assert torch.equal(run(stage.client(plan), seed=seed), expect(seed=seed))


def test_hidden_states_in_bfloat16_stay_so_on_the_wire(stage):
    host = stage.host("a")
    client = stage.client(make_plan(1, split_holders(host), stage.hosts))
    x_TD, assignment = make_tokens(9)
    x_TD = x_TD.bfloat16()
    found = client.combine(client.dispatch(0, x_TD, assignment))
    ids_TK, gates_TK, _ = assignment
    assert host.calls[0].dtype == "bfloat16" and host.calls[0].x_TD.dtype == np.uint16
    assert np.array_equal(found.numpy(), compute_sums(0, x_TD.float().numpy(), ids_TK.numpy(), gates_TK.numpy()))


def test_a_narrower_wire_is_refused_where_numerics_are_exact(stage):
    host = stage.host("a")
    plan = make_plan(1, split_holders(host), stage.hosts)
    wire = WIRE.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(ConfigError, match=r"wire\.dtype=bfloat16 rounds .* torch\.float32"):
        run(stage.client(plan, wire=wire))
    found = run(stage.client(plan, exact=False, wire=wire))
    assert host.calls[0].dtype == "bfloat16"
    # Both ways rounded to eight bits; values near ten.
    torch.testing.assert_close(found, expect(), rtol=2**-7, atol=2**-4)


def test_answers_too_long_for_a_frame_are_asked_for_in_parts(stage):
    host = stage.host("a")
    wire = WIRE.model_copy(update={"max_frame_bytes": (1 << 16) + 10 * 4 * D_MODEL})
    client = stage.client(make_plan(1, split_holders(host), stage.hosts), wire=wire)
    assert torch.equal(run(client), expect())
    assert len(host.calls) > 3
    assert all(np.count_nonzero(call.expert_ids_TK >= 0) <= 10 for call in host.calls)


def test_a_large_call_is_sent_when_the_host_has_answered_the_one_before(stage):
    # A host that computes or sends reads nothing: with both ends full, each would wait for the other.
    host = stage.host("a")
    client = stage.client(make_plan(1, split_holders(host), stage.hosts))
    num_seen = []
    stage.on_sent = lambda: num_seen.append(len(host.calls))
    handles = [client.dispatch(0, *make_tokens(6000, seed=seed)) for seed in range(3)]
    for seed, handle in enumerate(handles):
        assert torch.equal(client.combine(handle), expect(layer=0, num_tokens=6000, seed=seed))
    assert num_seen == [0, 1, 2]


def test_replicas_share_the_work(stage):
    hosts = [stage.host(name) for name in "ab"]
    client = stage.client(make_plan(1, [hosts] * NUM_EXPERTS, stage.hosts))
    run(client)
    stage.sent.clear()
    assert torch.equal(run(client), expect())
    experts = [set(piece.expert_ids_TK.ravel().tolist()) - {-1} for piece in stage.sent]
    assert len(experts) == 2 and experts[0].isdisjoint(experts[1])
    assert experts[0] | experts[1] == set(range(NUM_EXPERTS))


MISBEHAVIOURS = {
    "is gone": lose,
    "hangs": hang,
    "does not hold it": refuse("not_held"),
    "is overloaded": refuse("overloaded"),
    "fails": refuse("failed"),
    "answers nonsense": lambda host, call: answer(host, call_like(call, num_tokens=1)),
}


def call_like(call, *, num_tokens):
    fields = {name: getattr(call, name) for name in call.__slots__}
    for name in ("x_TD", "expert_ids_TK", "gates_TK"):
        fields[name] = fields[name][-num_tokens:]
    return type(call)(**fields)


@pytest.mark.parametrize("behave", MISBEHAVIOURS.values(), ids=MISBEHAVIOURS)
def test_another_replica_answers_where_one(stage, behave):
    good, bad = stage.host("good"), stage.host("bad", behave)
    client = stage.client(make_plan(1, [[bad, good]] * NUM_EXPERTS, stage.hosts))
    for seed in range(4):
        assert torch.equal(run(client, seed=seed), expect(seed=seed))
    assert bad.calls and client.statistics.num_retries >= 1
    assert not any(call.on_demand for call in good.calls)


def test_a_hung_host_is_avoided_for_a_while_though_it_shakes_hands_again(stage):
    good, bad = stage.host("good"), stage.host("bad", hang)
    client = stage.client(make_plan(1, [[bad, good]] * NUM_EXPERTS, stage.hosts))
    for seed in range(10):
        assert torch.equal(run(client, seed=seed), expect(seed=seed))
    # Tried again after a second, should this take so long.
    assert len(bad.calls) < 5 and client.suspected_hosts == {"bad": "late"}


@pytest.mark.parametrize(
    "behave", [lose, hang, refuse("not_held"), refuse("failed")], ids=["lost", "hung", "not held", "failed"]
)
def test_experts_without_a_living_replica_are_loaded_by_another_host(stage, behave):
    good, bad = stage.host("good"), stage.host("bad", behave)
    client = stage.client(make_plan(1, split_holders(good, bad), stage.hosts))
    assert torch.equal(run(client), expect())
    on_demand = [call for call in good.calls if call.on_demand]
    assert [set(call.expert_ids_TK.ravel().tolist()) - {-1} for call in on_demand] == [{1, 3, 5}]
    assert client.statistics.num_on_demand == 1


def test_routers_choose_the_same_refuge(stage):
    for name in "abcd":
        stage.host(name)
    gone = stage.host("gone", lose)
    plan = make_plan(1, split_holders(gone), stage.hosts)
    for _ in range(2):
        assert torch.equal(run(stage.client(plan)), expect())
    chosen = {}
    for piece in stage.sent:
        if piece.on_demand:
            for expert_id in set(piece.expert_ids_TK.ravel().tolist()) - {-1}:
                chosen.setdefault(expert_id, set()).add(piece.host_id)
    assert len(chosen) == NUM_EXPERTS and all(len(host_ids) == 1 for host_ids in chosen.values())
    assert len(set.union(*chosen.values())) > 1


def test_an_overloaded_host_is_asked_again(stage):
    def behave(host, call):
        return (refuse("overloaded") if len(host.calls) < 3 else answer)(host, call)

    host, other = stage.host("a", behave), stage.host("b")
    client = stage.client(make_plan(1, split_holders(host), stage.hosts))
    assert torch.equal(run(client), expect())
    assert len(host.calls) == 3 and not other.calls


def test_a_host_that_comes_back_is_used_again(stage):
    host = stage.host("a")
    client = stage.client(make_plan(1, split_holders(host), stage.hosts))
    run(client)
    host.stop()
    starter = start_timer(0.1, host.start)
    assert torch.equal(run(client, seed=1), expect(seed=1))
    starter.join()
    assert client.suspected_hosts == {}


def start_timer(delay_s, function):
    timer = threading.Timer(delay_s, function)
    timer.start()
    return timer


def test_a_lone_host_that_is_slow_is_waited_for(stage):
    def behave(host, call):
        ready.wait(10)
        return answer(host, call)

    ready = threading.Event()
    host = stage.host("a", behave)
    client = stage.client(make_plan(1, split_holders(host), stage.hosts))
    timer = start_timer(0.6, ready.set)
    assert torch.equal(run(client), expect())
    assert len(host.calls) == 1
    timer.join()


def test_without_any_host_the_expert_and_what_was_tried_are_named(stage):
    host = stage.host("only", lose)
    wire = WIRE.model_copy(update={"request_deadline_s": 0.5})
    client = stage.client(make_plan(1, split_holders(host), stage.hosts), wire=wire)
    with pytest.raises(
        ExpertUnavailableError, match=r"expert 0 of layer 1: none of 1 replicas.* 0\.5 s \(only: .*lost"
    ):
        run(client)
    assert client.suspected_hosts == {"only": "lost"}


def test_a_newer_plan_that_a_host_sends_is_used_at_once(stage):
    old, new = stage.host("old"), stage.host("new")
    newer = make_plan(2, split_holders(new), [old, new])
    old.behave = push(newer, refuse("not_held"))
    client = stage.client(make_plan(1, split_holders(old), [old]))
    assert torch.equal(run(client), expect())
    assert client.plan.version == 2 and [call.plan_version for call in new.calls] == [2]
    assert torch.equal(run(client, seed=1), expect(seed=1))
    assert len(old.calls) == 1


def test_an_older_plan_changes_nothing(stage):
    host, other = stage.host("a"), stage.host("b")
    client = stage.client(make_plan(5, split_holders(host), stage.hosts))
    client.update_plan(make_plan(4, split_holders(other), stage.hosts))
    assert torch.equal(run(client), expect())
    assert client.plan.version == 5 and not other.calls


def test_calls_of_two_micro_batches_may_be_answered_in_any_order(stage):
    waiting = []

    def behave(host, call):
        waiting.append(call)
        if len(waiting) < 2:
            return None
        second, first = waiting.pop(), waiting.pop()
        return [*answer(host, second), *answer(host, first)]

    host = stage.host("a", behave)
    wire = WIRE.model_copy(update={"expert_deadline_s": 5.0})
    client = stage.client(make_plan(1, split_holders(host), stage.hosts), wire=wire)
    handles = [client.dispatch(0, *make_tokens(12, seed=seed)) for seed in (1, 2)]
    for handle, seed in zip(handles, (1, 2), strict=True):
        assert torch.equal(client.combine(handle), expect(layer=0, num_tokens=12, seed=seed))


def test_the_answer_to_a_call_that_nobody_waits_for_is_ignored(stage):
    host = stage.host("a")
    client = stage.client(make_plan(1, split_holders(host), stage.hosts))
    run(client)
    client.dispatch(0, *make_tokens(12, seed=3))
    assert client.outstanding_work["a"] > 0
    assert torch.equal(run(client, seed=1), expect(seed=1))
    assert client.outstanding_work == {"a": 0}


def test_a_host_of_the_same_node_is_preferred(stage):
    far, near = stage.host("far", node_id="elsewhere"), stage.host("near")
    client = stage.client(make_plan(1, [[far, near]] * NUM_EXPERTS, stage.hosts))
    for _ in range(3):
        run(client, num_tokens=2)
    assert len(near.calls) == 3 and not far.calls


def test_hosts_that_cannot_be_reached_are_told_and_tried_again(stage):
    attempts = []

    def connect(info):
        attempts.append(info.host_id)
        raise ConnectionLostError("no way there")

    host = stage.host("a")
    wire = WIRE.model_copy(update={"request_deadline_s": 0.6})
    client = stage.client(make_plan(1, split_holders(host), stage.hosts), connect=connect, wire=wire)
    with pytest.raises(ExpertUnavailableError, match="a: no way there"):
        run(client)
    assert len(attempts) > 1 and client.suspected_hosts == {"a": "lost"}
