"""A router's end of a connection to an expert host: calls made up for a tiny artifact, and what comes back."""

import itertools
from contextlib import contextmanager

import numpy as np
import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.serving.expert_host import ExpertHost
from dsmoe_ray.serving.expert_pool import ExpertPool
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan
from dsmoe_ray.serving.wire.expert_codec import call_to_frame, refusal_from_frame, result_from_frame
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.messages import ExpertCall, Kind
from dsmoe_ray.serving.wire.plan_codec import plan_from_frame
from dsmoe_ray.serving.wire.transport import open_connection, open_listener

SECRET, MODEL = b"sixteen bytes or more", "tiny"
NUM_LAYERS, NUM_EXPERTS, D_MODEL = 2, 4, 16
ALL = [LogicalExpert(layer, expert_id) for layer in range(NUM_LAYERS) for expert_id in range(NUM_EXPERTS)]
ANSWER_S = 60.0
"""Far more than any answer takes, so that only a lost one runs into it."""
_numbers = itertools.count()


@contextmanager
def running_host(directory, *, memory_bytes=None, dtype=None, host_id="here", **options):
    """Run an expert host for a tiny artifact at ``memory://``; yields it."""
    pool = ExpertPool(load_artifact(directory), memory_bytes=memory_bytes, dtype=dtype)
    info = HostInfo(host_id=host_id, addresses=(), node_id="node", memory_bytes=pool.capacity * pool.expert_bytes)
    host = ExpertHost(pool, info, **options)
    try:
        address = f"memory://host-{next(_numbers)}"
        hello = Hello(role="host", model_digest=MODEL)
        host.serve(open_listener(address, host.handle, hello, secret=SECRET))
        yield host
    finally:
        host.close()


def connect(host):
    """Return a router's connection to a host."""
    hello = Hello(role="router", model_digest=MODEL)
    return open_connection(host.report().info.addresses[0], hello, secret=SECRET, timeout_s=ANSWER_S)


def make_call(layer=0, num_tokens=3, *, expert_ids=None, exact=True, seed=0, dtype="float32", **fields):
    """Return a call whose tokens want one to three experts each, or exactly ``expert_ids``."""
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, D_MODEL, generator=generator)
    width = 3 if expert_ids is None else len(expert_ids)
    ids_TK = np.full((num_tokens, width), -1, np.int32)
    gates_TK = np.zeros((num_tokens, width), np.float32)
    for token in range(num_tokens):
        wanted = expert_ids
        if wanted is None:
            wanted = torch.randperm(NUM_EXPERTS, generator=generator)[: 1 + token % 3].sort().values.tolist()
        ids_TK[token, : len(wanted)] = wanted
        gates_TK[token, : len(wanted)] = torch.rand(len(wanted), generator=generator).numpy()
    x_TD = x_TD.numpy() if dtype == "float32" else x_TD.bfloat16().view(torch.uint16).numpy()
    values = {"call_id": seed, "plan_version": 0, "deadline_ms": int(1000 * ANSWER_S)} | fields
    return ExpertCall(
        layer=layer, exact=exact, dtype=dtype, x_TD=x_TD, expert_ids_TK=ids_TK, gates_TK=gates_TK, **values
    )


def ask(connection, call):
    """Send a call and return what comes next."""
    connection.send(call_to_frame(call))
    return receive(connection)


def receive(connection):
    """Return the next message of a host; its array is a copy."""
    frame = connection.receive(ANSWER_S)
    assert frame is not None, "no answer"
    readers = {
        Kind.EXPERT_RESULT: result_from_frame,
        Kind.EXPERT_REFUSAL: refusal_from_frame,
        Kind.PLAN: plan_from_frame,
    }
    return readers[frame.kind](frame)


def make_plan(version, holders):
    """Return a plan by the ids of the holders of each expert; all others are at "there"."""
    host_ids = {"there", *itertools.chain.from_iterable(holders.values())}
    hosts = {
        host_id: HostInfo(host_id=host_id, addresses=(f"memory://{host_id}",), node_id="node", memory_bytes=1 << 20)
        for host_id in sorted(host_ids)
    }
    replicas = {expert: tuple(holders.get(expert, ("there",))) for expert in ALL}
    return PlacementPlan(version=version, hosts=hosts, replicas=replicas)
