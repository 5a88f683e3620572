"""A gateway as a replica of Ray Serve, which is the ingress of the application. Imports no torch."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from dsmoe_ray.serving.control_agent import ControlAgent
from dsmoe_ray.serving.gateway_process import GatewayProcess
from dsmoe_ray.serving.on_ray.replica import ControllerLink, make_process_id, read_replica_setup


class _Gateway:
    def __init__(self, values: dict[str, Any], controller: DeploymentHandle, *others: DeploymentHandle) -> None:
        """Read the setup; ``others`` belong to the application, and no call of ours goes through their handles."""
        self._setup = read_replica_setup(values)
        self._link = ControllerLink(controller, self._setup)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the gateway on the loop that will serve it."""
        gateway_id = make_process_id("gateway")
        self._process = GatewayProcess(self._setup, gateway_id)
        await self._process.start()
        interval_s = self._setup.config.experts.interval_s
        self._agent = ControlAgent(gateway_id, lambda: self._process.sync(self._link.send), interval_s=interval_s)
        return self._process.app

    async def check_health(self) -> None:
        """Raise if the gateway cannot go on."""
        if not self._agent.is_running:
            raise RuntimeError("the thread that reports to the controller has ended; see the log")

    async def __del__(self) -> None:
        """Stop; Serve has waited for all requests of its own."""
        await self._process.stop()
        self._agent.close()
        self._process.close()


GatewayReplica = serve.ingress()(_Gateway)
