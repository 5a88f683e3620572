"""An expert host as a replica of Ray Serve."""

import asyncio
from typing import Any

from ray.serve.handle import DeploymentHandle

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.serving.control_agent import ControlAgent
from dsmoe_ray.serving.on_ray.replica import ControllerLink, make_process_id, read_replica_setup
from dsmoe_ray.serving.processes import HostProcess
from dsmoe_ray.serving.serve_policies import MEMORY_BYTES, NEEDED_BYTES, UTILIZATION

_LOOK_S = 0.05
_UNUSED_S = 1.0
"""A host that stops and that no router has been connected to for so long is needed by nobody."""


class HostReplica:
    """Holds experts and computes what they say."""

    def __init__(self, values: dict[str, Any], controller: DeploymentHandle) -> None:
        setup = read_replica_setup(values)
        self._config, self._model = setup.config, setup.model
        host_id = make_process_id("host")
        self._process = HostProcess(setup, host_id)
        link = ControllerLink(controller, setup)
        self._agent = ControlAgent(
            host_id, lambda: self._process.sync(link.send), interval_s=setup.config.experts.interval_s
        )
        self._counted_s, self._counted_busy_s = monotonic_s(), 0.0

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what ``HostPolicy`` reads."""
        report, now_s = self._process.host.report(), monotonic_s()
        duration_s = max(now_s - self._counted_s, 1e-3)
        utilization = (report.busy_s - self._counted_busy_s) / duration_s
        self._counted_s, self._counted_busy_s = now_s, report.busy_s
        resident = self._model.num_layers * self._model.num_experts if self._config.experts.min_replicas else 0
        return {
            UTILIZATION: utilization,
            NEEDED_BYTES: float(resident * self._model.expert_bytes),
            MEMORY_BYTES: float(report.info.memory_bytes),
        }

    async def check_health(self) -> None:
        """Raise if the host cannot go on."""
        if not self._agent.is_running:
            raise RuntimeError("the thread that reports to the controller has ended; see the log")

    async def __del__(self) -> None:
        """Stay until the controller has given all experts to others, or no router is left."""
        host = self._process.host
        host.leave()
        self._agent.wake()
        used_s = monotonic_s()
        while monotonic_s() - used_s < _UNUSED_S and not host.wait_until_unneeded(0.0):
            if self._process.is_used:
                used_s = monotonic_s()
            await asyncio.sleep(_LOOK_S)
        self._agent.close()
        await asyncio.to_thread(host.close)
