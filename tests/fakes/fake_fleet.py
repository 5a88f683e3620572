"""Hosts and routers that obey a controller without processes: they load what they are told, or do not, or die."""

from dataclasses import dataclass, field

from dsmoe_ray.serving.config import ExpertHostsConfig, ExpertScalingConfig
from dsmoe_ray.serving.control import GatewayReport, HostReport, OperatorSettings, RouterInfo, RouterReport
from dsmoe_ray.serving.demand import index_experts
from dsmoe_ray.serving.plan import HostInfo, PlacementPlan
from dsmoe_ray.serving.replica_controller import ReplicaController
from tests.fakes.fake_clock import FakeClock

INTERVAL_S = 0.25
EXPERT_BYTES = 100


@dataclass
class FakeHost:
    """Does what it is told at once."""

    host_id: str
    memory_bytes: int = 10**6
    node_id: str = "node"
    held: set = field(default_factory=set)
    num_tokens: dict = field(default_factory=dict)
    busy_s: float = 0.0
    plan: PlacementPlan | None = None
    is_silent: bool = False
    is_leaving: bool = False
    loads: bool = True
    """Loads new experts; otherwise it says why not."""
    may_leave: bool = False
    num_loads: int = 0
    _sends_plan: bool = False
    settings: OperatorSettings = field(default_factory=OperatorSettings)

    def sync(self, controller):
        """Report and obey."""
        info = HostInfo(
            host_id=self.host_id,
            addresses=(f"memory://{self.host_id}",),
            node_id=self.node_id,
            memory_bytes=self.memory_bytes,
        )
        orders = controller.sync_host(
            HostReport(
                info=info,
                plan_version=0 if self.plan is None else self.plan.version,
                held=frozenset(self.held),
                failures={} if self.loads else dict.fromkeys(index_experts(2, 4), "the disk is on fire"),
                num_tokens=dict(self.num_tokens),
                busy_s=self.busy_s,
                leaving=self.is_leaving,
                plan=self.plan if self._sends_plan else None,
                settings=self.settings,
            )
        )
        self._sends_plan, self.may_leave, self.settings = orders.send_plan, orders.may_leave, orders.settings
        assert len(orders.hold) * EXPERT_BYTES <= self.memory_bytes, "more than fits into memory"
        if orders.plan is not None:
            assert self.plan is None or orders.plan.version > self.plan.version
            self.plan = orders.plan
        new = orders.hold - self.held
        self.num_loads += len(new) if self.loads else 0
        self.held = set(orders.hold if self.loads else orders.hold & self.held)
        return orders


@dataclass
class FakeRouter:
    """Follows the newest plan that it hears of."""

    router_id: str
    plan: PlacementPlan | None = None
    suspected: dict = field(default_factory=dict)
    is_silent: bool = False
    is_deaf: bool = False
    """Reports, and never takes a new plan."""

    def sync(self, controller):
        """Report and obey."""
        version = 0 if self.plan is None else self.plan.version
        info = RouterInfo(router_id=self.router_id, addresses=(f"memory://{self.router_id}",), node_id="node")
        orders = controller.sync_router(RouterReport(info=info, plan_version=version, suspected=self.suspected))
        if orders.plan is not None and not self.is_deaf:
            self.plan = orders.plan


@dataclass
class FakeFleet:
    """One application without a process. Every turn is one interval."""

    hosts: dict
    routers: dict
    scaling: ExpertScalingConfig
    num_hosts: int = 2
    clock: FakeClock = field(default_factory=FakeClock)
    load: dict = field(default_factory=dict)
    """Tokens per second by expert, shared between the replicas that the first router knows."""
    experts: tuple = index_experts(2, 4)

    def __post_init__(self):
        self.restart_controller()

    def restart_controller(self):
        """Let the controller die and another one start."""
        self.controller = ReplicaController(
            self.experts,
            expert_bytes=EXPERT_BYTES,
            scaling=self.scaling,
            hosts=ExpertHostsConfig(count=self.num_hosts, heartbeat_timeout_s=1.5),
            clock=self.clock,
            unix_clock=self.clock,
        )

    def add_host(self, host_id, **fields):
        """Start a host."""
        self.hosts[host_id] = FakeHost(host_id, **fields)
        return self.hosts[host_id]

    def turn(self, num_turns=1):
        """Let everyone who is not silent report, after the tokens of the time between."""
        for _ in range(num_turns):
            self.clock.advance(INTERVAL_S)
            self._compute()
            for host in self.hosts.values():
                if not host.is_silent:
                    host.sync(self.controller)
            for router in self.routers.values():
                if not router.is_silent:
                    router.sync(self.controller)
            self.controller.step()
            self.check_plan()

    def settle(self):
        """Turn until nothing changes any more."""
        for _ in range(80):
            version = self.controller.plan.version
            self.turn(8)
            if self.controller.plan.version == version and not self.controller.describe().missing:
                return
        raise AssertionError("it never comes to rest")

    def check_plan(self):
        """Every expert of a published plan is somewhere, and only where somebody lives."""
        plan = self.controller.plan
        if plan.hosts:
            assert plan.replicas.keys() == set(self.experts)
        for host_ids in plan.replicas.values():
            assert host_ids and len(set(host_ids)) == len(host_ids)
            assert set(host_ids) <= plan.hosts.keys()

    def kinds(self):
        """Return the kinds of all events."""
        return [event.kind for event in self.controller.list_events()]

    def sync_gateway(self, **fields):
        """Report as a gateway; return its orders."""
        return self.controller.sync_gateway(GatewayReport(gateway_id="gateway", **fields))

    def _compute(self):
        router = next(iter(self.routers.values()), None)
        if router is None or router.plan is None:
            return
        for expert, tokens_per_s in self.load.items():
            living = [host_id for host_id in router.plan.replicas[expert] if not self.hosts[host_id].is_silent]
            for host_id in living:
                tokens = self.hosts[host_id].num_tokens
                tokens[expert] = tokens.get(expert, 0) + int(tokens_per_s * INTERVAL_S / len(living))


def make_fleet(*, num_hosts=2, **scaling):
    """Return an application of which nobody has reported yet; a replica takes 100 tokens a second."""
    values = {
        "target_utilization": 1.0,
        "tokens_per_replica_s": 100.0,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 5.0,
        "look_back_s": 0.5,
    }
    fleet = FakeFleet(
        hosts={},
        routers={"router": FakeRouter("router")},
        scaling=ExpertScalingConfig(**values | scaling),
        num_hosts=num_hosts,
    )
    for number in range(num_hosts):
        fleet.add_host(f"host-{number}")
    return fleet
