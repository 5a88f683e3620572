"""What scaling costs: one more replica of an expert, and one more plan for a large fleet."""

import os
from pathlib import Path

import numpy as np

from dsmoe_ray.artifact.load import Artifact, load_artifact
from dsmoe_ray.bench.engine_side import publish
from dsmoe_ray.bench.measure import Measurement, Spread
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import BenchError
from dsmoe_ray.serving.control import HostOrders
from dsmoe_ray.serving.demand import ExpertDemand, index_experts
from dsmoe_ray.serving.expert_host import ExpertHost
from dsmoe_ray.serving.expert_pool import ExpertPool
from dsmoe_ray.serving.placement import plan_placement
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert

_NUM_LAYERS, _NUM_EXPERTS, _NUM_HOSTS = 40, 250, 1000
_EXPERT_BYTES = 10 << 20
_ROOM_RATIO = 1.5
_ZIPF_EXPONENT = 1.0
_WORKLOAD = "granite_191m"
_LOAD_TIMEOUT_S = 60.0


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


def measure_added_replica(settings: Settings) -> Measurement:
    """Return the milliseconds from an order to hold an expert until it is held, less those of reading its bytes.

    The system's copy of the file is dropped before either, so that both come from the disk.
    """
    artifact = load_artifact(publish(_WORKLOAD, "float32"))
    pool = ExpertPool(artifact)
    host = ExpertHost(pool, HostInfo(host_id="host", addresses=(), node_id="bench", memory_bytes=1 << 40))
    # The first load starts threads and is no measure of a running host.
    _load(host, LogicalExpert(0, 0))
    beyond_ms, load_ms, read_ms = [], [], []
    for number in range(settings.turns().num_pairs):
        _drop_cached(artifact)
        load_ms.append(1e3 * _load(host, LogicalExpert(1 + number % (pool.num_layers - 1), number)))
        _drop_cached(artifact)
        read_ms.append(1e3 * _read(artifact, pool.expert_bytes))
        beyond_ms.append(load_ms[-1] - read_ms[-1])
    host.close()
    return Measurement(
        figure=Spread.of(beyond_ms),
        ours={"load_ms": Spread.of(load_ms).median},
        baseline={"read_ms": Spread.of(read_ms).median},
        details={"expert_bytes": pool.expert_bytes},
    )


def _load(host: ExpertHost, expert: LogicalExpert) -> float:
    start_s = monotonic_s()
    host.apply(HostOrders(hold=host.report().held | {expert}))
    if not host.wait_until_loaded(_LOAD_TIMEOUT_S):
        raise BenchError(f"an expert was not loaded within {_LOAD_TIMEOUT_S:g} s")
    return monotonic_s() - start_s


def _read(artifact: Artifact, num_bytes: int) -> float:
    with open(_largest_file(artifact), "rb", buffering=0) as file:
        file.seek(num_bytes)
        start_s = monotonic_s()
        file.read(num_bytes)
        return monotonic_s() - start_s


def _drop_cached(artifact: Artifact) -> None:
    with open(_largest_file(artifact), "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _largest_file(artifact: Artifact) -> Path:
    return max(artifact.directory.glob("*.safetensors"), key=lambda path: path.stat().st_size)


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
