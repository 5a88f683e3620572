"""An expert host inside the test's process whose experts are plain formulas, and that can be told to misbehave."""

import itertools

import numpy as np
import torch

from dsmoe_ray.errors import ConnectionLostError
from dsmoe_ray.model.dispatch import ExpertAssignment
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan
from dsmoe_ray.serving.wire.expert_codec import ModelSizes, call_from_frame, refusal_to_frame, result_to_frame
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.messages import ExpertRefusal, ExpertResult, PlanMessage
from dsmoe_ray.serving.wire.plan_codec import plan_to_frame
from dsmoe_ray.serving.wire.transport import open_listener

SECRET, MODEL = b"0123456789abcdef", "some model"
NUM_LAYERS, NUM_EXPERTS, D_MODEL = 2, 6, 8
SIZES = ModelSizes(num_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, d_model=D_MODEL)
_numbers = itertools.count()


def compute_expert(layer, expert_id, x_TD, gates_T):
    """Return gated rows, the same bits for a token whoever else is there."""
    return (np.float32(expert_id + 1) * x_TD / np.float32(3 + layer) + np.float32(expert_id)) * gates_T[:, None]


def compute_sums(layer, x_TD, ids_TK, gates_TK):
    """Return what a layer's experts say in all, added in ascending order of ids from zero."""
    y_TD = np.zeros_like(x_TD)
    for expert_id in range(NUM_EXPERTS):
        tokens, ks = np.nonzero(ids_TK == expert_id)
        y_TD[tokens] += compute_expert(layer, expert_id, x_TD[tokens], gates_TK[tokens, ks])
    return y_TD


class FakeExpertHost:
    """Answers calls as ``behave`` says; ``calls`` are those that it has seen.

    ``behave(host, call)`` returns frames, or None for nothing at all; by default the answer.
    """

    def __init__(self, host_id, behave=None, *, node_id="here"):
        self.host_id, self.behave = host_id, behave or answer
        self.calls, self.connections = [], []
        self.address = f"memory://fake-{next(_numbers)}"
        self.info = HostInfo(host_id=host_id, addresses=(self.address,), node_id=node_id, memory_bytes=1 << 20)
        self.start()

    def start(self):
        hello = Hello(role="host", model_digest=MODEL, identity={"host_id": self.host_id})
        self.listener = open_listener(self.address, self.serve, hello, secret=SECRET)

    def serve(self, connection):
        self.connections.append(connection)
        while True:
            try:
                frame = connection.receive()
                call = call_from_frame(frame, SIZES)
                call = copy_call(call)
                self.calls.append(call)
                for reply in self.behave(self, call) or ():
                    connection.send(reply)
            except ConnectionLostError:
                return

    def stop(self):
        self.listener.close()
        for connection in self.connections:
            connection.close()


def copy_call(call):
    arrays = {name: getattr(call, name).copy() for name in ("x_TD", "expert_ids_TK", "gates_TK")}
    fields = {name: getattr(call, name) for name in call.__slots__} | arrays
    return type(call)(**fields)


def answer(host, call):
    x_TD = from_wire(call.x_TD)
    if not call.exact:
        y = to_wire(compute_sums(call.layer, x_TD, call.expert_ids_TK, call.gates_TK), call.dtype)
    else:
        rows = [
            compute_expert(call.layer, expert_id, x_TD[token : token + 1], call.gates_TK[token, k : k + 1])
            for token in range(len(x_TD))
            for k, expert_id in enumerate(call.expert_ids_TK[token].tolist())
            if expert_id >= 0
        ]
        y = np.concatenate(rows)
    return [result_to_frame(ExpertResult(call_id=call.call_id, compute_us=100, queue_us=5, y=y))]


def hang(host, call):
    return None


def lose(host, call):
    host.stop()


def refuse(reason):
    def behave(host, call):
        return [refusal_to_frame(ExpertRefusal(call_id=call.call_id, reason=reason, message="not today"))]

    return behave


def push(plan, then=answer):
    def behave(host, call):
        return [plan_to_frame(PlanMessage(plan=plan)), *then(host, call)]

    return behave


def to_wire(x_TD, dtype):
    return torch.from_numpy(x_TD).bfloat16().view(torch.uint16).numpy() if dtype == "bfloat16" else x_TD


def from_wire(x_TD):
    return torch.from_numpy(x_TD).view(torch.bfloat16).float().numpy() if x_TD.dtype == np.uint16 else x_TD


def make_plan(version, holders, hosts):
    """Return a plan in which expert e of every layer is held by ``holders[e]``."""
    return PlacementPlan(
        version=version,
        hosts={host.host_id: host.info for host in hosts},
        replicas={
            LogicalExpert(layer, expert_id): tuple(host.host_id for host in held_by)
            for layer in range(NUM_LAYERS)
            for expert_id, held_by in enumerate(holders)
        },
    )


def make_tokens(num_tokens, *, width=4, seed=0):
    """Return tokens that want none to ``width`` experts."""
    generator = np.random.default_rng(seed)
    x_TD = generator.standard_normal((num_tokens, D_MODEL)).astype(np.float32)
    ids_TK = np.full((num_tokens, width), -1, np.int32)
    gates_TK = np.zeros((num_tokens, width), np.float32)
    for token in range(num_tokens):
        count = token % (width + 1)
        ids_TK[token, :count] = np.sort(generator.choice(NUM_EXPERTS, count, replace=False))
        gates_TK[token, :count] = generator.random(count)
    return torch.from_numpy(x_TD), ExpertAssignment(torch.from_numpy(ids_TK), torch.from_numpy(gates_TK))
