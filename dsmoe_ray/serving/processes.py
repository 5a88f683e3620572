"""The kinds of processes of a serving application, each built from its setup. No Ray here.

Each has a method that reports to the controller and does what it answers; how a report travels is the caller's matter.
"""

import dataclasses
import logging
import os
import threading
from collections.abc import Callable

import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.loading import choose_numerics, load_engine
from dsmoe_ray.model.config import MoeConfig
from dsmoe_ray.serving.control import (
    HostOrders,
    HostReport,
    OperatorSettings,
    RouterInfo,
    RouterOrders,
    RouterReport,
)
from dsmoe_ray.serving.expert_client import RemoteExperts
from dsmoe_ray.serving.expert_host import ExpertHost
from dsmoe_ray.serving.expert_pool import ExpertPool
from dsmoe_ray.serving.host_links import build_connect
from dsmoe_ray.serving.plan import HostInfo, PlacementPlan
from dsmoe_ray.serving.process_setup import ProcessSetup
from dsmoe_ray.serving.router_service import RouterLimits, RouterService
from dsmoe_ray.serving.wire.connection import Connection, HandleConnection

_logger = logging.getLogger(__name__)


class _Connections:
    """Counts the connections that are there."""

    def __init__(self, handle: HandleConnection) -> None:
        self._handle, self._lock = handle, threading.Lock()
        self.num = 0

    def handle(self, connection: Connection) -> None:
        """Serve a connection until it ends."""
        with self._lock:
            self.num += 1
        try:
            self._handle(connection)
        finally:
            with self._lock:
                self.num -= 1


class HostProcess:
    """An expert host that listens."""

    def __init__(self, setup: ProcessSetup, host_id: str) -> None:
        """Listen, holding nothing yet.

        Raises:
            ArtifactError: the artifact cannot be read.
            ConfigError: not one expert fits into memory.
        """
        hosts = setup.config.hosts
        device = torch.device("cuda" if hosts.num_gpus and torch.cuda.is_available() else "cpu")
        pool = ExpertPool(
            load_artifact(setup.config.artifact),
            memory_bytes=hosts.memory_bytes,
            dtype=_read_dtype(setup),
            device=device,
        )
        info = HostInfo(
            host_id=host_id,
            addresses=(),
            node_id=setup.node_id,
            memory_bytes=pool.capacity * pool.expert_bytes,
        )
        self.host = ExpertHost(pool, info, num_threads=hosts.num_threads)
        self.expert_bytes = pool.expert_bytes
        self._settings = OperatorSettings()
        self._routers = _Connections(self.host.handle)
        for listener in setup.listen("host", host_id, self._routers.handle):
            self.host.serve(listener)

    def sync(self, send: Callable[[HostReport], HostOrders]) -> None:
        """Report once and do what is answered."""
        orders = send(dataclasses.replace(self.host.report(), settings=self._settings))
        if orders.settings.version > self._settings.version:
            self._settings = orders.settings
        self.host.apply(orders)

    @property
    def is_used(self) -> bool:
        """Return whether any router is connected."""
        return self._routers.num > 0


class RouterProcess:
    """A router that listens and computes."""

    def __init__(self, setup: ProcessSetup, router_id: str) -> None:
        """Load the model, all but its experts where hosts have them, and start.

        Raises:
            ArtifactError: the artifact cannot be read.
            ConfigError: the configuration does not fit the model or the machine.
        """
        config = setup.config
        torch.set_num_threads(config.routers.num_threads or os.cpu_count() or 1)
        artifact = load_artifact(config.artifact)
        self.experts: RemoteExperts | None = None
        if config.hosts.count:
            ffn = artifact.model_config.ffn
            assert isinstance(ffn, MoeConfig)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.experts = RemoteExperts(
                PlacementPlan(version=0),
                num_experts=ffn.num_experts,
                exact=choose_numerics(config.engine, device) == "exact",
                connect=build_connect(
                    setup.make_hello("router", router_id),
                    secret=setup.secret,
                    node_id=setup.node_id,
                    wire=config.wire,
                ),
                node_id=setup.node_id,
                wire=config.wire,
            )
        self.service = RouterService(
            load_engine(artifact, config.engine, experts=self.experts),
            RouterInfo(router_id=router_id, addresses=(), node_id=setup.node_id),
            experts=self.experts,
            limits=RouterLimits(max_request_s=config.http.max_request_s),
        )
        self._is_leaving = False
        self._gateways = _Connections(self.service.handle)
        for listener in setup.listen("router", router_id, self._gateways.handle):
            self.service.serve(listener)
        self.service.start()

    def sync(self, send: Callable[[RouterReport], RouterOrders]) -> None:
        """Report once and do what is answered."""
        report = self.service.report()
        orders = send(dataclasses.replace(report, info=dataclasses.replace(report.info, leaving=self._is_leaving)))
        self.service.apply(orders)
        if orders.may_leave:
            self.service.leave()

    def leave(self) -> None:
        """Give all sequences to another router as soon as there is one; until then serve on."""
        self._is_leaving = True

    @property
    def is_used(self) -> bool:
        """Return whether any gateway is connected."""
        return self._gateways.num > 0

    @property
    def is_idle(self) -> bool:
        """Return whether there is no request."""
        return self.service.wait_until_idle(0.0)

    def close(self) -> None:
        """Stop at once."""
        self.service.close()
        if self.experts is not None:
            self.experts.close()


def _read_dtype(setup: ProcessSetup) -> torch.dtype | None:
    name = setup.config.engine.dtype
    return None if name == "auto" else getattr(torch, name)
