"""Expert hosts of one artifact inside the test's process, over any transport, and a router's experts on them."""

import itertools
import random
from contextlib import ExitStack

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.data.tokenizer import train_tokenizer
from dsmoe_ray.serving.config import WireConfig
from dsmoe_ray.serving.control import HostOrders
from dsmoe_ray.serving.expert_client import RemoteExperts
from dsmoe_ray.serving.expert_host import ExpertHost
from dsmoe_ray.serving.expert_pool import ExpertPool
from dsmoe_ray.serving.host_links import build_connect
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.transport import open_listener

TRANSPORTS = ("memory", "unix", "grpc")
PATIENT = WireConfig(expert_deadline_s=30.0, request_deadline_s=60.0)
"""Nothing hangs in most tests; a deadline that a busy machine misses would only send a call twice."""
_SECRET, _MODEL, _NODE = b"sixteen bytes or more", "the model", "node"
_WAIT_S = 60.0
_numbers = itertools.count()


class ExpertFleet:
    """Hosts, the plan that deals them the experts at random, and clients. A context."""

    def __init__(self, directory, *, num_hosts, transport="memory", seed=0):
        self.directory, self.transport = directory, transport
        self.random = random.Random(seed)
        self.stack = ExitStack()
        config = load_artifact(directory).model_config
        self.num_experts = config.ffn.num_experts
        self.experts = [
            LogicalExpert(*pair) for pair in itertools.product(range(config.num_layers), range(self.num_experts))
        ]
        self.hosts, self.held = {}, {}
        """By host id: the hosts, and what each was ever told to hold."""
        for number in range(num_hosts):
            self.start_host(f"host-{number}")
        self.plan = PlacementPlan(version=0)
        self.change_plan()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()

    def start_host(self, host_id):
        info = HostInfo(host_id=host_id, addresses=(), node_id=_NODE, memory_bytes=1 << 30)
        host = ExpertHost(ExpertPool(load_artifact(self.directory)), info)
        self.stack.callback(host.close)
        hello = Hello(role="host", model_digest=_MODEL, identity={"host_id": host_id})
        host.serve(open_listener(self.make_address(), host.handle, hello, secret=_SECRET))
        self.hosts[host_id], self.held[host_id] = host, frozenset()

    def make_address(self):
        number = next(_numbers)
        return {
            "memory": f"memory://fleet-{number}",
            "unix": f"unix://{self.directory.parent}/{number}.sock",
            "grpc": "grpc://127.0.0.1:0",
        }[self.transport]

    def client(self, *, exact=True, wire=PATIENT, audit=None):
        experts = RemoteExperts(
            self.plan,
            num_experts=self.num_experts,
            exact=exact,
            connect=build_connect(Hello(role="router", model_digest=_MODEL), secret=_SECRET, node_id=_NODE, wire=wire),
            node_id=_NODE,
            wire=wire,
            audit=audit,
        )
        self.stack.callback(experts.close)
        assert experts.wait_until_connected(_WAIT_S)
        return experts

    def change_plan(self):
        """Publish other placements: new holders have their experts first, old ones keep them."""
        ids = list(self.hosts)
        replicas = {
            expert: tuple(self.random.sample(ids, min(len(ids), self.random.choice([1, 1, 2]))))
            for expert in self.experts
        }
        hosts = {host_id: host.report().info for host_id, host in self.hosts.items()}
        plan = PlacementPlan(version=self.plan.version + 1, hosts=hosts, replicas=replicas)
        for host_id, host in self.hosts.items():
            self.held[host_id] |= plan.held_by(host_id)
            host.apply(HostOrders(hold=self.held[host_id], plan=plan))
        assert all(host.wait_until_loaded(_WAIT_S) for host in self.hosts.values())
        self.plan = plan
        return plan

    def lose_host(self, host_id):
        """Let a host die without a word."""
        self.hosts.pop(host_id).close()


def publish(model, directory):
    """Write a model as an artifact and return where."""
    tokenizer = train_tokenizer(["some text"] * 4, vocab_size=model.config.vocab_size)
    save_artifact(
        directory,
        model_config=model.config,
        tensors=model.state_dict().items(),
        tokenizer_json=tokenizer.to_json(),
        provenance={},
    )
    return directory
