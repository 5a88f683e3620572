"""A router as a replica of Ray Serve."""

import asyncio
from typing import Any

from ray.serve.handle import DeploymentHandle

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.serving.control_agent import ControlAgent
from dsmoe_ray.serving.on_ray.replica import ControllerLink, make_process_id, read_replica_setup
from dsmoe_ray.serving.processes import RouterProcess
from dsmoe_ray.serving.serve_policies import LOAD

_LOOK_S = 0.05
_IDLE_S = 2.0
"""How long a router that stops waits for requests of gateways that are still there."""
_MARGIN_S = 10.0


class RouterReplica:
    """Runs everything of the model but its experts."""

    def __init__(self, values: dict[str, Any], controller: DeploymentHandle) -> None:
        setup = read_replica_setup(values)
        self._config = setup.config
        router_id = make_process_id("router")
        self._process = RouterProcess(setup, router_id)
        link = ControllerLink(controller, setup)
        self._agent = ControlAgent(
            router_id, lambda: self._process.sync(link.send), interval_s=setup.config.experts.interval_s
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what ``RouterPolicy`` reads."""
        return {LOAD: self._process.service.report().load}

    async def check_health(self) -> None:
        """Raise if the router cannot go on."""
        if not self._process.service.is_running or not self._agent.is_running:
            raise RuntimeError("a thread of the router has ended; see the log")

    async def __del__(self) -> None:
        """Give all sequences to another router; without one, end them, and those that gateways still send."""
        self._process.leave()
        self._agent.wake()
        stop_s = monotonic_s() + self._config.http.drain_s + _MARGIN_S
        busy_s = monotonic_s()
        while monotonic_s() < stop_s and monotonic_s() - busy_s < (_IDLE_S if self._process.is_used else 0.0):
            if not self._process.is_idle:
                busy_s = monotonic_s()
            await asyncio.sleep(_LOOK_S)
        self._agent.close()
        await asyncio.to_thread(self._process.close)
