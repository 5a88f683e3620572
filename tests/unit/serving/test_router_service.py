"""The serving loop, one turn at a time: who is told what, who is let go, what a failed step costs."""

import functools
import threading
from contextlib import ExitStack

import pytest
import torch

from dsmoe_ray.errors import ExpertUnavailableError, FrameError
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.serving.control import RouterInfo, RouterOrders
from dsmoe_ray.serving.plan import PlacementPlan
from dsmoe_ray.serving.router_service import RouterLimits, RouterService
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.generation_codec import from_frame, to_frame
from dsmoe_ray.serving.wire.messages import CancelMessage, GenerateMessage, Kind
from tests.fakes.fake_clock import FakeClock
from tests.fakes.fake_connection import LONG_S, FakeConnection
from tests.fakes.scripted_runner import ScriptedRunner
from tests.fakes.tiny_artifact import make_config, make_tokenizer

CONFIG = make_config()
INFO = RouterInfo(router_id="r", addresses=(), node_id="here")


@functools.cache
def tokenizer():
    return make_tokenizer(CONFIG)


def say_next(tokens):
    """Count on."""
    logits_V = torch.zeros(CONFIG.vocab_size)
    logits_V[tokens[-1] + 1] = 1.0
    return logits_V


class Bench:
    """A router without a thread, and its gateways."""

    def __init__(self, stack, limits=None, experts=None, **config):
        config = EngineConfig(**{"block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 12} | config)
        self.runner = ScriptedRunner(CONFIG, say_next, block_size=config.block_size, num_blocks=40)
        self.engine = Engine(self.runner, tokenizer(), config)
        self.clock = FakeClock()
        self.router = RouterService(self.engine, INFO, limits=limits, experts=experts, now_s=self.clock)
        self._stack = stack
        stack.callback(self.router.close)

    def connect(self, name="g", *, has_status=True):
        connection = FakeConnection(gateway_id=name)
        failure = []

        def handle():
            try:
                self.router.handle(connection)
            except Exception as error:
                failure.append(error)

        thread = threading.Thread(target=handle, daemon=True)
        thread.start()
        connection.failure, connection.thread = failure, thread
        self._stack.callback(connection.close)
        if has_status:
            # It is there from now on.
            connection.next_sent(Kind.ROUTER_STATUS)
        return connection

    def ask(self, connection, request_id="a", *, deadline_ms=None, prompt=(5, 6, 7), **fields):
        request = GenerationRequest(**{"prompt_ids": prompt, "max_tokens": 3} | fields)
        connection.deliver(to_frame(GenerateMessage(request_id=request_id, request=request, deadline_ms=deadline_ms)))

    def turn(self, times=1):
        for _ in range(times):
            self.router.turn()

    def fail_steps(self, error, times):
        step = self.engine.step
        left = [times]

        def fail():
            if left[0] == 0:
                return step()
            left[0] -= 1
            raise error

        self.engine.step = fail


@pytest.fixture
def make_bench():
    with ExitStack() as stack:
        yield functools.partial(Bench, stack)


def told(connection):
    """Return what the next frame tells: tokens by request, or why one is rejected."""
    message = from_frame(connection.next_sent(Kind.OUTPUTS, Kind.REJECTED))
    if hasattr(message, "reason"):
        return message.request_id, message.reason
    return [(output.request_id, output.token.token_id, output.finish_reason) for output in message.outputs]


def test_every_step_tells_each_gateway_its_own_in_one_frame(make_bench):
    bench = make_bench()
    first, second = bench.connect("g1"), bench.connect("g2")
    bench.ask(first, "a", prompt=(10,))
    bench.turn()
    assert told(first) == [("a", 11, None)]
    bench.ask(first, "b", prompt=(20,))
    bench.turn()
    bench.ask(second, "a", prompt=(30,))
    told_first = [told(first)]
    bench.turn()
    told_first.append(told(first))
    assert told_first == [[("a", 12, None), ("b", 21, None)], [("a", 13, "length"), ("b", 22, None)]]
    assert told(second) == [("a", 31, None)]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": (5, 300)}, "prompt_ids"),
        ({"n": 5}, "n"),
        ({"max_tokens": 0, "prompt_logprobs": 20, "prompt": (5,) * 300_000}, "prompt_logprobs"),
    ],
    ids=["foreign token", "n beyond the queue", "prompt beyond a frame"],
)
def test_an_impossible_request_is_rejected_with_its_field(make_bench, fields, param):
    bench = make_bench(max_waiting=4)
    connection = bench.connect()
    bench.ask(connection, **fields)
    bench.turn()
    message = from_frame(connection.next_sent(Kind.REJECTED))
    assert (message.request_id, message.reason, message.param) == ("a", "invalid", param)


def test_a_request_that_the_codec_refuses_is_rejected_and_its_gateway_stays(make_bench):
    bench = make_bench()
    connection = bench.connect()
    request = GenerationRequest(prompt_ids=[5], max_tokens=3)
    frame = to_frame(GenerateMessage(request_id="a", request=request))
    connection.deliver(Frame(frame.kind, {**frame.header, "n": 0}, frame.payloads))
    assert told(connection) == ("a", "invalid")
    bench.ask(connection, "b")
    bench.turn()
    assert told(connection) == [("b", 8, None)]


def test_two_requests_of_one_name_are_one_too_many(make_bench):
    bench = make_bench()
    connection = bench.connect()
    bench.ask(connection)
    bench.turn()
    told(connection)
    bench.ask(connection)
    bench.turn()
    assert told(connection) == ("a", "invalid")
    assert told(connection) == [("a", 9, None)]


def test_a_full_engine_says_so(make_bench):
    bench = make_bench(max_waiting=1)
    connection = bench.connect()
    bench.ask(connection, "a")
    bench.ask(connection, "b")
    bench.turn()
    assert told(connection) == ("b", "full")
    assert told(connection) == [("a", 8, None)]


def test_what_is_no_message_of_a_gateway_ends_its_connection_only(make_bench):
    bench = make_bench()
    bad, good = bench.connect("bad"), bench.connect("good")
    bench.ask(bad, "a")
    bench.turn()
    told(bad)
    bad.deliver(Frame(Kind.GENERATE, {"id": "b"}))
    bad.thread.join(LONG_S)
    assert isinstance(bad.failure[0], FrameError) and bad.is_closed.is_set()
    bench.ask(good, "c")
    bench.turn()
    assert told(good) == [("c", 8, None)]
    assert bench.engine.status.num_running == 1


def test_a_cancelled_request_and_those_of_a_lost_gateway_are_in_no_later_step(make_bench):
    bench = make_bench()
    stays, leaves = bench.connect("stays"), bench.connect("leaves")
    bench.ask(stays, "a")
    bench.ask(stays, "b")
    bench.ask(leaves, "a", n=2)
    bench.turn()
    assert bench.engine.status.num_running == 4
    leaves.close()
    leaves.thread.join(LONG_S)
    stays.deliver(to_frame(CancelMessage(request_ids=("b", "unknown"))))
    bench.turn(2)
    assert bench.runner.batches[1:] == [[1], [1]]
    assert not bench.engine.has_work and bench.router.read_status().num_outstanding_tokens == 0


def test_a_gateway_that_does_not_read_is_cut_off_and_nobody_waits_for_it(make_bench):
    bench = make_bench(limits=RouterLimits(max_buffered_outputs=2))
    slow, quick = bench.connect("slow"), bench.connect("quick")
    slow.stall()
    bench.ask(slow, max_tokens=20)
    bench.turn()
    bench.ask(quick, max_tokens=8)
    for token in range(8, 15):
        bench.turn()
        assert told(quick) == [("a", token, None)]
    assert slow.is_closed.is_set()
    slow.thread.join(LONG_S)
    while bench.engine.has_work:
        bench.turn()
    assert bench.runner.batches[-1] == [1] and len(bench.runner.batches) < 20


def test_a_step_without_its_expert_is_tried_again_with_growing_pauses_and_loses_nothing(make_bench):
    bench = make_bench()
    connection = bench.connect()
    bench.fail_steps(ExpertUnavailableError("expert 7"), 4)
    bench.ask(connection)
    for pause_s in (0.0, 0.011, 0.021, 0.041):
        bench.clock.advance(pause_s)
        bench.turn()
    # Not yet: this turn only takes what has come.
    bench.clock.advance(0.041)
    bench.ask(connection, "b")
    bench.turn()
    assert not bench.runner.batches
    bench.clock.advance(0.04)
    bench.turn()
    assert told(connection) == [("a", 8, None), ("b", 8, None)]


def test_requests_whose_deadline_passes_fail_and_say_what_was_missing(make_bench):
    bench = make_bench()
    connection = bench.connect()
    bench.fail_steps(ExpertUnavailableError("expert 7 is nowhere"), 2)
    bench.ask(connection, "a", deadline_ms=1000)
    bench.turn()
    bench.ask(connection, "b")
    bench.clock.advance(0.99)
    bench.turn()
    bench.clock.advance(0.02)
    bench.turn()
    message = from_frame(connection.next_sent(Kind.REJECTED))
    assert (message.request_id, message.reason) == ("a", "expired") and "expert 7 is nowhere" in message.message
    bench.clock.advance(1.0)
    bench.turn()
    # Steps that end while a frame is written travel together.
    assert told(connection)[0] == ("b", 8, None)


def test_a_step_that_fails_for_other_reasons_costs_the_newest_requests_first(make_bench):
    bench = make_bench()
    connection = bench.connect()
    bench.ask(connection, "old")
    bench.turn()
    told(connection)
    bench.fail_steps(ValueError("a bug"), 4)
    for name in ("new", "newer"):
        bench.ask(connection, name)
    for _ in range(5):
        bench.turn()
        bench.clock.advance(1.0)
    assert [told(connection) for _ in range(3)] == [("newer", "failed"), ("new", "failed"), [("old", 9, None)]]


def test_a_step_that_never_succeeds_fails_everyone_and_the_router_lives(make_bench):
    bench = make_bench()
    connection = bench.connect()
    bench.ask(connection, "a", n=2)
    bench.turn()
    told(connection)
    bench.fail_steps(ValueError("a bug"), 3)
    for _ in range(3):
        bench.turn()
        bench.clock.advance(1.0)
    assert told(connection) == ("a", "failed")
    bench.ask(connection, "b")
    bench.turn()
    assert told(connection) == [("b", 8, None)]


def test_a_router_that_leaves_tells_everyone_and_finishes_what_it_has(make_bench):
    bench = make_bench()
    connection = bench.connect()
    bench.ask(connection, "a")
    bench.turn()
    told(connection)
    bench.router.leave()
    while not from_frame(connection.next_sent(Kind.ROUTER_STATUS)).leaving:
        pass
    assert from_frame(bench.connect("late", has_status=False).next_sent()).leaving
    bench.ask(connection, "b")
    assert not bench.router.wait_until_idle(0)
    bench.turn(2)
    heard = list(told(connection))
    while heard[-1] != ("a", 10, "length"):
        heard += told(connection)
    assert heard[:2] == ["b", "leaving"]
    assert bench.router.wait_until_idle(0)
    assert bench.router.report().info.leaving


def test_a_router_that_closes_writes_what_it_has_told(make_bench):
    bench = make_bench()
    connection = bench.connect()
    bench.ask(connection)
    bench.turn(2)
    bench.router.close()
    heard = told(connection)
    while len(heard) < 2:
        heard += told(connection)
    assert heard == [("a", 8, None), ("a", 9, None)] and connection.is_closed.is_set()
    assert bench.connect("late", has_status=False).is_closed.wait(LONG_S)


def test_a_router_whose_loop_fails_cuts_all_gateways_and_no_longer_runs(make_bench):
    bench = make_bench()
    first, second = bench.connect("g1"), bench.connect("g2")
    go_on = threading.Event()

    def next_logits(tokens):
        go_on.wait(LONG_S)
        return say_next(tokens)

    def fail(request_id):
        raise ValueError("a bug")

    bench.runner.next_logits, bench.engine.cancel = next_logits, fail
    bench.router.start()
    bench.ask(first)
    first.deliver(to_frame(CancelMessage(request_ids=("a",))))
    go_on.set()
    assert first.is_closed.wait(LONG_S) and second.is_closed.wait(LONG_S)
    bench.router.close()
    assert not bench.router.is_running


def test_a_step_under_way_shows_how_long_it_has_lasted(make_bench):
    bench = make_bench()
    connection = bench.connect()
    ages_ms = []

    def next_logits(tokens):
        bench.clock.advance(12.5)
        ages_ms.append(bench.router.read_status().step_age_ms)
        return say_next(tokens)

    bench.runner.next_logits = next_logits
    bench.ask(connection)
    bench.turn()
    assert (ages_ms, bench.router.read_status().step_age_ms) == ([12_500], 0)


class FakeExperts:
    def __init__(self):
        self.plan = PlacementPlan(version=1)
        self.suspected_hosts = {"h1": "late"}

    def update_plan(self, plan):
        self.plan = plan


def test_the_controller_hears_what_it_needs_and_its_plan_is_used(make_bench):
    experts = FakeExperts()
    bench = make_bench(experts=experts)
    connection = bench.connect()
    bench.ask(connection, "a", n=2)
    bench.turn()
    report = bench.router.report()
    assert (report.info.router_id, report.plan_version, report.plan) == ("r", 1, None)
    assert (dict(report.suspected), report.num_running, report.load) == ({"h1": "late"}, 2, 0.5)
    newer = PlacementPlan(version=2)
    bench.router.apply(RouterOrders(plan=newer, send_plan=True))
    assert bench.router.report().plan is newer
    bench.router.apply(RouterOrders())
    assert bench.router.report().plan is None
