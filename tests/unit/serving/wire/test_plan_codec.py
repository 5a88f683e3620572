"""Plans survive the wire, stay small, and what no plan can be is refused."""

import numpy as np
import pytest

from dsmoe_ray.errors import FrameError
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan
from dsmoe_ray.serving.wire.codec import decode_message, encode_frame
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.messages import PlanMessage
from dsmoe_ray.serving.wire.plan_codec import plan_from_frame, plan_to_frame


def make_host(number):
    addresses = (f"unix:///tmp/{number}.sock", f"grpc://10.0.0.{number}:1234")
    return HostInfo(host_id=f"h{number}", addresses=addresses, node_id=f"n{number % 7}", memory_bytes=1 << 40)


def make_plan(num_experts, num_hosts):
    hosts = {f"h{number}": make_host(number) for number in range(num_hosts)}
    experts = [LogicalExpert(number // 100, number % 100) for number in range(num_experts)]
    replicas = {
        expert: tuple(f"h{(number + other) % num_hosts}" for other in range(1 + number % 3))
        for number, expert in enumerate(experts)
    }
    return PlacementPlan(version=5, hosts=hosts, replicas=replicas, cold=frozenset(experts[::3]))


@pytest.mark.parametrize(("num_experts", "num_hosts"), [(0, 0), (0, 3), (1, 3), (250, 5)])
def test_a_plan_survives(num_experts, num_hosts):
    message = PlanMessage(plan=make_plan(num_experts, num_hosts))
    parts, _ = encode_frame(plan_to_frame(message), 1 << 20)
    found = plan_from_frame(decode_message(b"".join(parts), 1 << 20))
    assert found == message
    assert all(type(expert) is LogicalExpert for expert in found.plan.replicas)


def test_a_plan_of_ten_thousand_experts_takes_some_twenty_bytes_for_each():
    message = PlanMessage(plan=make_plan(10_000, 1000))
    parts, num_bytes = encode_frame(plan_to_frame(message), 1 << 20)
    # 12 bytes an expert, 4 a replica, 8 for each of a third that is cold; some 80 a host.
    assert num_bytes < 10_000 * 23 + 1000 * 80
    assert plan_from_frame(decode_message(b"".join(parts), 1 << 20)) == message


def test_a_plan_that_names_an_unknown_host_is_not_sent():
    plan = PlacementPlan(version=1, replicas={LogicalExpert(0, 0): ("gone",)})
    with pytest.raises(ValueError, match=r"replicas name host 'gone'"):
        plan_to_frame(PlanMessage(plan=plan))


def ints(*values):
    return memoryview(np.array(values, np.int32)).cast("B")


# Of a plan with two hosts and experts (0, 0) on both and (0, 1) on the second.
WRONG = {
    "version": ({"version": -1}, {}),
    "hosts": ({"hosts": 3}, {}),
    "hosts must each": ({"hosts": [["h0"]]}, {}),
    "addresses": ({"hosts": [["h0", [], "n", 1]]}, {}),
    "address must": ({"hosts": [["h0", [5], "n", 1]]}, {}),
    "memory_bytes": ({"hosts": [["h0", ["unix:///x"], "n", -1]]}, {}),
    "hosts must differ": ({"hosts": [["h0", ["unix:///x"], "n", 1]] * 2}, {}),
    "experts must be pairs": ({}, {0: ints(0, 0, 1)}),
    "both from 0": ({}, {0: ints(0, 0, 0, -1)}),
    "experts must differ": ({}, {0: ints(0, 0, 0, 0)}),
    "counts of shape": ({}, {1: ints(2, 1, 0)}),
    "counts must": ({}, {1: ints(4, -1)}),
    "add up": ({}, {1: ints(2, 2)}),
    "hosts must be from 0 to 1": ({}, {2: ints(0, 1, 2)}),
    "differ for each": ({}, {2: ints(0, 0, 1)}),
    "cold experts": ({}, {3: ints(0)}),
    "multiple of 4": ({}, {2: memoryview(bytes(11))}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_refused_by_the_name_of_what_is_wrong(name):
    replicas = {LogicalExpert(0, 0): ("h0", "h1"), LogicalExpert(0, 1): ("h1",)}
    hosts = {"h0": make_host(0), "h1": make_host(1)}
    frame = plan_to_frame(PlanMessage(plan=PlacementPlan(version=1, hosts=hosts, replicas=replicas)))
    header, payloads = WRONG[name]
    wrong = Frame(
        frame.kind,
        {**frame.header, **header},
        [payloads.get(index, bytes(payload)) for index, payload in enumerate(frame.payloads)],
    )
    with pytest.raises(FrameError, match=name):
        plan_from_frame(wrong)
