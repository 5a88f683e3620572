"""Decoding with experts on two hosts against decoding in one process, on the same cores."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.bench.engine_side import EngineSide, build_engine, build_engine_config, publish
from dsmoe_ray.bench.engine_workloads import ENGINE_WORKLOADS
from dsmoe_ray.bench.host_process import NODE_ID, make_secret, start_hosts
from dsmoe_ray.bench.measure import Measurement, compare_speed
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.workloads import Dtype
from dsmoe_ray.errors import BenchError
from dsmoe_ray.inference.loading import build_runner, load_model
from dsmoe_ray.serving.config import WireConfig
from dsmoe_ray.serving.expert_client import RemoteExperts
from dsmoe_ray.serving.host_links import build_connect
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan
from dsmoe_ray.serving.wire.handshake import Hello

_WORKLOAD = "granite_191m"
_NUM_HOSTS = 2
_CONNECT_TIMEOUT_S = 30.0


def compare_with_local(
    settings: Settings, *, dtype: Dtype, numerics: Literal["exact", "fast"], batch_size: str
) -> Measurement:
    """Return decode tokens/s with each layer's experts on two hosts of one thread, over those of one process."""
    workload, batch = ENGINE_WORKLOADS[_WORKLOAD], int(batch_size)
    artifact = publish(_WORKLOAD, dtype)
    local_engine = build_engine(workload, artifact, batch_size=batch, numerics=numerics)
    with run_remote_experts(artifact, exact=numerics == "exact") as experts:
        config = build_engine_config(workload, batch, numerics=numerics)
        trunk = load_model(load_artifact(artifact), device=torch.device("cpu"), with_experts=False)
        runner = build_runner(trunk, config, experts=experts)
        remote_engine = build_engine(workload, artifact, batch_size=batch, runner=runner, numerics=numerics)
        remote = EngineSide(remote_engine, workload, batch_size=batch)
        local = EngineSide(local_engine, workload, batch_size=batch)
        found = compare_speed(remote, local, settings.turns())
        statistics = experts.statistics
        details = {name: getattr(statistics, name) for name in ("num_calls", "num_retries")}
    if numerics == "exact" and remote.generations != local.generations:
        raise BenchError("tokens with remote experts differ from those of one process")
    return replace(found, details=details)


@contextmanager
def run_remote_experts(artifact: Path, *, exact: bool) -> Iterator[RemoteExperts]:
    """Start two hosts that share the experts of every layer, and connect to them over Unix sockets."""
    config: Any = load_artifact(artifact).model_config
    secret = make_secret()
    with tempfile.TemporaryDirectory(prefix="dsmoe-bench-") as directory:
        addresses = [f"unix://{directory}/{number}.sock" for number in range(_NUM_HOSTS)]
        with start_hosts(artifact, addresses, secret=secret) as hosts:
            wire = WireConfig()
            connect = build_connect(
                Hello(role="router", model_digest="bench"), secret=secret, node_id=NODE_ID, wire=wire
            )
            experts = RemoteExperts(
                make_plan(hosts, num_layers=config.num_layers, num_experts=config.ffn.num_experts),
                num_experts=config.ffn.num_experts,
                exact=exact,
                connect=connect,
                node_id=NODE_ID,
                wire=wire,
            )
            try:
                if not experts.wait_until_connected(_CONNECT_TIMEOUT_S):
                    raise BenchError("the expert hosts cannot be reached")
                yield experts
            finally:
                experts.close()


def make_plan(hosts: list[HostInfo], *, num_layers: int, num_experts: int) -> PlacementPlan:
    """Return a plan that deals the experts of each layer to the hosts in turn."""
    return PlacementPlan(
        version=1,
        hosts={host.host_id: host for host in hosts},
        replicas={
            LogicalExpert(layer, expert_id): (hosts[expert_id % len(hosts)].host_id,)
            for layer in range(num_layers)
            for expert_id in range(num_experts)
        },
    )
