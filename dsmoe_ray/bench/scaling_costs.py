"""What scaling costs: one more replica of an expert, and one more plan for a large fleet."""

import numpy as np

from dsmoe_ray.bench.measure import Measurement, Spread
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.serving.demand import ExpertDemand, index_experts
from dsmoe_ray.serving.placement import plan_placement
from dsmoe_ray.serving.plan import HostInfo

_NUM_LAYERS, _NUM_EXPERTS, _NUM_HOSTS = 40, 250, 1000
_EXPERT_BYTES = 10 << 20
_ROOM_RATIO = 1.5
_ZIPF_EXPONENT = 1.0


def measure_planner(settings: Settings) -> Measurement:
    """Return the seconds to place 10,000 experts with Zipf loads on 1,000 hosts, and to follow a shift of the loads."""
    experts = index_experts(_NUM_LAYERS, _NUM_EXPERTS)
    generator = np.random.default_rng(0)
    memory_bytes = int(_ROOM_RATIO * 2 * len(experts) / _NUM_HOSTS) * _EXPERT_BYTES
    hosts = {
        f"host-{number:04d}": HostInfo(
            host_id=f"host-{number:04d}",
            addresses=(f"grpc://10.0.{number // 250}.{number % 250}:1",),
            node_id=f"node-{number // 8}",
            memory_bytes=memory_bytes,
        )
        for number in range(_NUM_HOSTS)
    }
    first_s, next_s, ratios = [], [], []
    for _ in range(settings.turns().num_pairs):
        start_s = monotonic_s()
        first = plan_placement(_make_demand(experts, generator), hosts, None, expert_bytes=_EXPERT_BYTES)
        first_s.append(monotonic_s() - start_s)
        demand = _make_demand(experts, generator)
        start_s = monotonic_s()
        plan_placement(demand, hosts, first.plan, expert_bytes=_EXPERT_BYTES)
        next_s.append(monotonic_s() - start_s)
        ratios.append(first.max_over_mean)
    return Measurement(
        figure=Spread.of(first_s),
        details={"after_a_shift_s": Spread.of(next_s).median, "max_over_mean": Spread.of(ratios).median},
    )


def _make_demand(experts: tuple, generator: np.random.Generator) -> ExpertDemand:
    loads_E = 1e6 / np.arange(1, len(experts) + 1) ** _ZIPF_EXPONENT
    generator.shuffle(loads_E)
    replica_load = loads_E.sum() / len(experts)
    return ExpertDemand(
        experts=experts,
        replicas_E=np.clip(np.ceil(loads_E / replica_load), 1, 8).astype(np.int64),
        loads_E=loads_E,
        load_errors_E=np.zeros_like(loads_E),
        replica_load=replica_load,
    )
