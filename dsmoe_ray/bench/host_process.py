"""An expert host in a process of its own, as a bench wants it: ``python -m dsmoe_ray.bench.host_process``.

Reads one JSON line that says what to serve, answers with one when it is ready, and ends when its input does.
"""

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.errors import BenchError
from dsmoe_ray.serving.control import HostOrders
from dsmoe_ray.serving.expert_host import ExpertHost
from dsmoe_ray.serving.expert_pool import ExpertPool
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.transport import open_listener

NODE_ID = "bench"
_EXIT_TIMEOUT_S = 20.0
_LOAD_TIMEOUT_S = 120.0


@contextmanager
def start_host(
    artifact: Path, address: str, *, host_id: str, secret: bytes, num_threads: int = 1
) -> Iterator[HostInfo]:
    """Run a host of one thread that holds every expert of an artifact; it ends with the block.

    Raises:
        BenchError: it does not become ready.
    """
    job = {"artifact": str(artifact), "address": address, "host_id": host_id, "num_threads": 1}
    process = subprocess.Popen(
        [sys.executable, "-m", "dsmoe_ray.bench.host_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps({**job, "secret": secret.hex()}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise BenchError(f"expert host {host_id} ended with code {process.wait()} before it was ready")
        yield HostInfo(host_id=host_id, addresses=(json.loads(line)["address"],), node_id=NODE_ID, memory_bytes=1 << 40)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


@contextmanager
def start_hosts(artifact: Path, addresses: list[str], *, secret: bytes) -> Iterator[list[HostInfo]]:
    """Run one host for each address."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(start_host(artifact, address, host_id=f"host-{number}", secret=secret))
            for number, address in enumerate(addresses)
        ]


def make_secret() -> bytes:
    """Return a secret for the processes of one bench."""
    return secrets.token_bytes(32)


def serve(job: dict[str, Any]) -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(job["num_threads"])
    pool = ExpertPool(load_artifact(Path(job["artifact"])))
    info = HostInfo(host_id=job["host_id"], addresses=(), node_id=NODE_ID, memory_bytes=1 << 40)
    host = ExpertHost(pool, info, num_threads=job["num_threads"])
    hello = Hello(role="host", model_digest="bench", identity={"host_id": job["host_id"]})
    listener = open_listener(job["address"], host.handle, hello, secret=bytes.fromhex(job["secret"]))
    host.serve(listener)
    layers, experts = range(pool.num_layers), range(pool.num_experts)
    everyone = frozenset(LogicalExpert(layer, expert_id) for layer in layers for expert_id in experts)
    host.apply(HostOrders(hold=everyone))
    if not host.wait_until_loaded(_LOAD_TIMEOUT_S):
        raise BenchError(f"the experts were not read within {_LOAD_TIMEOUT_S:g} s")
    _say({"address": listener.address})
    sys.stdin.read()
    host.close()


def _say(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
