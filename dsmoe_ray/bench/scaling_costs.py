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
_HOSTS_PER_NODE = 8
_EXPERT_BYTES = 10 << 20
_ROOM_RATIO = 1.5
_ZIPF_EXPONENT = 1.0
_WORKLOAD = "granite_191m"
_LOAD_TIMEOUT_S = 60.0


def measure_planner(settings: Settings, *, start: str) -> Measurement:
    """Return the seconds to place 10,000 experts with Zipf loads on 1,000 hosts.

    Args:
        settings: How often.
        start: ``nothing``; ``drift``, a plan whose loads have since changed by a tenth; or ``shuffle``, one whose loads
            have all changed places, which no traffic does at once.
    """
    experts = index_experts(_NUM_LAYERS, _NUM_EXPERTS)
    generator = np.random.default_rng(0)
    hosts = _make_hosts(int(_ROOM_RATIO * 2 * len(experts) / _NUM_HOSTS) * _EXPERT_BYTES)
    loads_E = 1e6 / np.arange(1, len(experts) + 1) ** _ZIPF_EXPONENT
    durations_s, ratios, moved_bytes = [], [], []
    for _ in range(settings.turns().num_pairs):
        generator.shuffle(loads_E)
        plan = None
        if start != "nothing":
            plan = plan_placement(_make_demand(experts, loads_E), hosts, None, expert_bytes=_EXPERT_BYTES).plan
        if start == "drift":
            loads_E = loads_E * generator.uniform(0.9, 1.1, len(loads_E))
        if start == "shuffle":
            generator.shuffle(loads_E)
        demand = _make_demand(experts, loads_E)
        start_s = monotonic_s()
        placement = plan_placement(demand, hosts, plan, expert_bytes=_EXPERT_BYTES)
        durations_s.append(monotonic_s() - start_s)
        ratios.append(placement.max_over_mean)
        moved_bytes.append(float(placement.moved_bytes))
    return Measurement(
        figure=Spread.of(durations_s),
        details={"max_over_mean": Spread.of(ratios).median, "moved_bytes": Spread.of(moved_bytes).median},
    )


def _make_hosts(memory_bytes: int) -> dict[str, HostInfo]:
    host_ids = [f"host-{number:04d}" for number in range(_NUM_HOSTS)]
    return {
        host_id: HostInfo(
            host_id=host_id,
            addresses=("grpc://10.0.0.1:1",),
            node_id=f"node-{number // _HOSTS_PER_NODE}",
            memory_bytes=memory_bytes,
        )
        for number, host_id in enumerate(host_ids)
    }


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


def _make_demand(experts: tuple[LogicalExpert, ...], loads_E: np.ndarray) -> ExpertDemand:
    replica_load = float(loads_E.sum()) / len(experts)
    return ExpertDemand(
        experts=experts,
        replicas_E=np.ceil(loads_E / replica_load).astype(np.int64),
        loads_E=loads_E,
        load_errors_E=np.zeros_like(loads_E),
        replica_load=replica_load,
    )
