"""Routers with tiny engines, and a pool that reaches them: what a gateway sees, in one process."""

import itertools
import threading
import time
from pathlib import Path

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.serving.control import RouterInfo
from dsmoe_ray.serving.router_pool import RouterPool
from dsmoe_ray.serving.router_service import RouterService
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.transport import open_connection, open_listener

SECRET = b"a secret of the tests"
_names = itertools.count()


class PacedEngine:
    """An engine that computes so many steps and then nothing until it is allowed more."""

    def __init__(self, engine, num_steps):
        self._engine, self._num_left = engine, num_steps
        self.is_still = threading.Event()

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def step(self):
        if self._num_left == 0:
            self.is_still.set()
            time.sleep(0.001)
            return []
        self._num_left -= 1
        return self._engine.step()

    def allow(self, num_steps):
        """Let it compute so many steps more, any number if negative."""
        self._num_left = num_steps


class RouterCluster:
    """Routers at fixed addresses, each of which can be lost and come back."""

    def __init__(self, artifact: Path, directory: Path, *, scheme="memory", limits=None, silent=(), **engine):
        self._artifact, self._limits, self._engine = load_artifact(artifact), limits, engine
        name = next(_names)
        where = str(directory / f"{name}") if scheme == "unix" else f"test-{name}"
        self._prefix = f"{scheme}://{where}"
        self._silent = silent
        """Routers that shake hands and say nothing any more."""
        self.routers = {}

    def address(self, number):
        return f"{self._prefix}-{number}"

    def start(self, number, *, num_steps=-1):
        """Start a router that is not there, which stands still after ``num_steps`` steps; return its engine."""
        config = EngineConfig(**{"max_num_seqs": 8, "max_batched_tokens": 32, "num_blocks": 64} | self._engine)
        engine = PacedEngine(load_engine(self._artifact, config), num_steps)
        router = RouterService(
            engine,
            RouterInfo(router_id=f"r{number}", addresses=(), node_id="here"),
            limits=self._limits,
        )
        hello = Hello(role="router", model_digest="tiny", identity={"router_id": f"r{number}"})
        handle = _say_nothing if number in self._silent else router.handle
        listener = open_listener(self.address(number), handle, hello, secret=SECRET)
        router.serve(listener)
        router.start()
        self.routers[number] = (router, listener, engine)
        return engine

    def kill(self, number):
        """Lose a router: its connections end in the middle of whatever they carry."""
        router, listener, _ = self.routers.pop(number)
        listener.close()
        router.close()

    def close(self):
        for number in list(self.routers):
            self.kill(number)

    def connect(self, address):
        hello = Hello(role="gateway", model_digest="tiny", identity={"gateway_id": "g"})
        return open_connection(address, hello, secret=SECRET, timeout_s=5.0)

    def open_pool(self, *numbers, **settings):
        """Return a pool that knows some routers; to be called on an event loop."""
        pool = RouterPool(self.connect, **settings)
        pool.update_routers([self.address(number) for number in numbers])
        return pool


def _say_nothing(connection):
    while True:
        connection.receive()


async def read(pool, request_id, request, **settings):
    """Return all outputs of a request."""
    return [output async for output in pool.generate(request_id, request, **settings)]


def run_alone(engine, request):
    """Return the outputs of a request that nothing disturbs, by sequence."""
    engine.add("alone", request)
    outputs = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.sequence_idx, []).append(output)
    return outputs
