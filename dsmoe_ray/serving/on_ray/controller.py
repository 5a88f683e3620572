"""The controller as a replica of Ray Serve: reports come through its handle, and a task of its loop steps."""

import asyncio
from typing import Any

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.serving.control import (
    GatewayOrders,
    GatewayReport,
    HostOrders,
    HostReport,
    RouterOrders,
    RouterReport,
)
from dsmoe_ray.serving.controller_events import ControllerEvent
from dsmoe_ray.serving.demand import index_experts
from dsmoe_ray.serving.on_ray.replica import read_replica_setup
from dsmoe_ray.serving.plan import LogicalExpert
from dsmoe_ray.serving.process_setup import ServedExperts
from dsmoe_ray.serving.replica_controller import ControllerStatus, ReplicaController

_IDLE_SHARE = 0.75
"""Of its time that the controller leaves to reports, however long a step takes."""
_FORGET_S = 120.0


class ControllerReplica:
    """One controller for each model: while an application changes to another model there are two."""

    def __init__(self, values: dict[str, Any]) -> None:
        """Begin to step; on the loop that takes reports."""
        setup = read_replica_setup(values)
        self._config = setup.config
        self._controllers: dict[str, ReplicaController] = {}
        self._heard_s: dict[str, float] = {}
        self._current = self._find(setup.model)
        self._stepping = asyncio.create_task(self._step_forever(setup.model.digest))

    async def sync(
        self, model: ServedExperts, report: HostReport | RouterReport | GatewayReport
    ) -> HostOrders | RouterOrders | GatewayOrders:
        """Take a report; return what its sender is to do."""
        controller = self._find(model)
        self._heard_s[model.digest] = monotonic_s()
        if isinstance(report, HostReport):
            return controller.sync_host(report)
        if isinstance(report, RouterReport):
            return controller.sync_router(report)
        return controller.sync_gateway(report)

    async def describe(self) -> ControllerStatus:
        """Return what is, and what would be if all delays had passed."""
        return self._current.describe()

    async def list_events(self, after: int = 0) -> list[ControllerEvent]:
        """Return the events after one of them, oldest first."""
        return self._current.list_events(after)

    async def pin(self, layer: int, expert_id: int, num_replicas: int | None) -> None:
        """Give an expert this many replicas whatever its load; None lets load decide again."""
        expert = LogicalExpert(layer, expert_id)
        if num_replicas is None:
            self._current.unpin(expert)
        else:
            self._current.pin(expert, num_replicas)

    async def rollback(self, version: int) -> None:
        """Place experts as an earlier plan did, and keep it so."""
        self._current.rollback(version)

    async def resume(self) -> None:
        """Scale by load again."""
        self._current.resume()

    async def check_health(self) -> None:
        """Raise what ended the loop, so that Serve starts another controller."""
        if self._stepping.done():
            self._stepping.result()

    def _find(self, model: ServedExperts) -> ReplicaController:
        if model.digest not in self._controllers:
            self._controllers[model.digest] = ReplicaController(
                index_experts(model.num_layers, model.num_experts),
                expert_bytes=model.expert_bytes,
                scaling=self._config.experts,
                hosts=self._config.hosts,
            )
        return self._controllers[model.digest]

    async def _step_forever(self, current: str) -> None:
        interval_s = self._config.experts.interval_s
        while True:
            began_s = monotonic_s()
            for digest, controller in list(self._controllers.items()):
                if digest != current and began_s - self._heard_s.get(digest, began_s) > _FORGET_S:
                    del self._controllers[digest]
                else:
                    controller.step()
            duration_s = monotonic_s() - began_s
            await asyncio.sleep(max(interval_s - duration_s, duration_s * _IDLE_SHARE / (1 - _IDLE_SHARE)))
