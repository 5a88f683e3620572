"""An engine whose experts live in hosts generates what it generates alone: same tokens, texts and log probabilities.

Wherever experts live, while the plan changes under way, when hosts die, and when they have room for few experts only.
"""

import random
from contextlib import ExitStack

import pytest

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import SamplingConfig
from dsmoe_ray.serving.config import WireConfig
from dsmoe_ray.serving.control import HostOrders
from dsmoe_ray.serving.expert_client import RemoteExperts
from dsmoe_ray.serving.host_links import build_connect
from dsmoe_ray.serving.plan import PlacementPlan
from dsmoe_ray.serving.wire.handshake import Hello
from tests.fakes.host_calls import ALL, ANSWER_S, MODEL, NUM_EXPERTS, SECRET, running_host
from tests.fakes.tiny_artifact import write_tiny_artifact

# Nothing here hangs; a deadline that a busy machine misses would only send a call twice.
WIRE = WireConfig(expert_deadline_s=ANSWER_S, request_deadline_s=2 * ANSWER_S)
NUM_STEPS_BETWEEN = 3
"""Steps from one plan to the next."""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return load_artifact(write_tiny_artifact(tmp_path_factory.mktemp("tiny") / "artifact"))


class Fleet:
    """Hosts of one artifact, a plan, and a router's experts."""

    def __init__(self, stack, artifact, *, num_hosts, seed=0, **options):
        self.random = random.Random(seed)
        self.hosts = {
            f"host {number}": stack.enter_context(running_host(artifact.directory, host_id=f"host {number}", **options))
            for number in range(num_hosts)
        }
        self.plan = self.draw_plan(1)
        self.publish(self.plan)
        hello = Hello(role="router", model_digest=MODEL)
        self.experts = RemoteExperts(
            self.plan,
            num_experts=NUM_EXPERTS,
            exact=True,
            connect=build_connect(hello, secret=SECRET, node_id="node", wire=WIRE),
            node_id="node",
            wire=WIRE,
        )
        stack.callback(self.experts.close)
        assert self.experts.wait_until_connected(ANSWER_S)

    def draw_plan(self, version):
        """Return a plan that gives each expert to one or two hosts, whoever they are."""
        ids = list(self.hosts)
        replicas = {
            expert: tuple(sorted(self.random.sample(ids, min(len(ids), self.random.choice([1, 1, 2])))))
            for expert in ALL
        }
        hosts = {host_id: host.report().info for host_id, host in self.hosts.items()}
        return PlacementPlan(version=version, hosts=hosts, replicas=replicas)

    def publish(self, plan):
        """Tell the hosts only: the router hears of a plan from them."""
        for host_id, host in self.hosts.items():
            host.apply(HostOrders(hold=plan.held_by(host_id), plan=plan))
        assert all(host.wait_until_loaded(ANSWER_S) for host in self.hosts.values())

    def change_plan(self):
        """Give the experts to others; each new holder has them before the old one lets go."""
        old, self.plan = self.plan, self.draw_plan(self.plan.version + 1)
        for host_id, host in self.hosts.items():
            host.apply(HostOrders(hold=old.held_by(host_id) | self.plan.held_by(host_id)))
        assert all(host.wait_until_loaded(ANSWER_S) for host in self.hosts.values())
        self.publish(self.plan)

    def lose_host(self):
        """Let a host die without a word."""
        self.hosts.pop(self.random.choice(list(self.hosts))).close()

    @property
    def num_cold(self):
        return sum(host.counts.num_cold for host in self.hosts.values())


def generate(artifact, experts=None, between=lambda: None):
    """Return all that an engine says of a few requests, and how many steps it took."""
    config = EngineConfig(max_num_seqs=4, max_batched_tokens=20, num_blocks=24)
    engine = load_engine(artifact, config, experts=experts)
    draw = random.Random(5)
    for number in range(6):
        prompt_ids = [draw.randrange(artifact.model_config.vocab_size) for _ in range(draw.randint(1, 9))]
        sampling = SamplingConfig(temperature=0.8 * (number % 2), seed=number, logprobs=2)
        request = GenerationRequest(prompt_ids=prompt_ids, max_tokens=12, sampling=sampling, ignore_eos=True)
        engine.add(number, request)
    outputs, num_steps = [], 0
    while engine.has_work:
        outputs.append(engine.step())
        num_steps += 1
        if num_steps % NUM_STEPS_BETWEEN == 0:
            between()
    return outputs, num_steps


@pytest.fixture(scope="module")
def expected(artifact):
    outputs, num_steps = generate(artifact)
    assert num_steps > 3 * NUM_STEPS_BETWEEN
    return outputs


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_outputs_are_the_same_to_the_bit_while_experts_move(artifact, expected, num_hosts):
    with ExitStack() as stack:
        fleet = Fleet(stack, artifact, num_hosts=num_hosts, linger_s=0.0)
        found, _ = generate(artifact, fleet.experts, fleet.change_plan)
        assert found == expected
        assert fleet.plan.version > 3
        # The last change came after the last step, if at all.
        assert fleet.experts.plan.version >= fleet.plan.version - 1
        assert fleet.num_cold == 0


def test_outputs_are_the_same_when_hosts_die_one_after_another(artifact, expected):
    with ExitStack() as stack:
        fleet = Fleet(stack, artifact, num_hosts=4)
        found, _ = generate(artifact, fleet.experts, lambda: len(fleet.hosts) > 1 and fleet.lose_host())
        assert found == expected
        assert len(fleet.hosts) == 1
        # What it was not given it has read when it was needed.
        assert fleet.num_cold > 0


def test_outputs_are_the_same_with_room_for_two_experts_on_each_host(artifact, expected):
    expert_bytes = 3 * 8 * 16 * 4 if artifact.model_config.ffn.activation == "swiglu" else 2 * 8 * 16 * 4
    with ExitStack() as stack:
        fleet = Fleet(stack, artifact, num_hosts=2, memory_bytes=2 * expert_bytes)
        found, _ = generate(artifact, fleet.experts)
        assert found == expected
        assert all(len(host.report().held) <= 2 for host in fleet.hosts.values())
        assert fleet.num_cold > 0
