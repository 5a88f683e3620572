"""A gateway among other processes: its APIs, and the routers that the controller names. Without torch."""

import asyncio
import logging
from collections.abc import Callable

from fastapi import FastAPI

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.control import GatewayOrders, GatewayReport, RouterInfo
from dsmoe_ray.serving.gateway import Gateway
from dsmoe_ray.serving.grpc_api import GrpcApi
from dsmoe_ray.serving.http_app import build_http_app
from dsmoe_ray.serving.openai_api.served_model import ServedModel
from dsmoe_ray.serving.process_setup import ProcessSetup
from dsmoe_ray.serving.router_pool import RouterPool

_logger = logging.getLogger(__name__)


class GatewayProcess:
    """To be made on the event loop that serves its application."""

    def __init__(self, setup: ProcessSetup, gateway_id: str) -> None:
        """Know no router yet."""
        self._setup, self._gateway_id = setup, gateway_id
        self._loop = asyncio.get_running_loop()
        self._ids: dict[str, str] = {}
        """Router by address."""
        self._unready_reason: str | None = "the controller has not answered yet"
        self.pool = RouterPool(lambda address: setup.connect("gateway", gateway_id, address))
        config = setup.config
        num_routers = config.routers.max_count or config.routers.count
        self.gateway = Gateway(
            self.pool,
            ServedModel(setup.side_files, name=config.model_name),
            config.http,
            max_sequences=num_routers * config.engine.max_num_seqs,
            explain_unready=self._explain_unready,
        )
        self.app: FastAPI = build_http_app(self.gateway)
        # A new gateway begins before an old one has ended.
        self._grpc_api = GrpcApi(self.gateway, config.grpc, shares_port=True)

    async def start(self) -> None:
        """Serve gRPC where that is configured.

        Raises:
            UserError: the address cannot be had.
        """
        await self._grpc_api.start()

    async def stop(self) -> None:
        """Let calls over gRPC end within the time for that."""
        await self._grpc_api.stop(self._setup.config.http.drain_s)

    def sync(self, send: Callable[[GatewayReport], GatewayOrders]) -> None:
        """Report once and do what is answered; on a thread of its own."""
        orders = send(asyncio.run_coroutine_threadsafe(self._report(), self._loop).result())
        self._loop.call_soon_threadsafe(self._apply, orders)

    async def _report(self) -> GatewayReport:
        lost = frozenset(self._ids[address] for address in self.pool.lost_addresses if address in self._ids)
        num_requests = self.gateway.admission.num_sequences
        return GatewayReport(gateway_id=self._gateway_id, num_requests=num_requests, lost_routers=lost)

    def close(self) -> None:
        """Let all routers go."""
        self.pool.close()

    def _apply(self, orders: GatewayOrders) -> None:
        self._unready_reason = orders.unready_reason
        if orders.routers is None:
            return
        ids = {address: router.router_id for router in orders.routers if (address := self._find_address(router))}
        # One that the controller does not hear of, and that answers here, is not dead; one that leaves says so itself.
        lost = self.pool.lost_addresses
        ids |= {address: router_id for address, router_id in self._ids.items() if address not in lost}
        if ids.keys() != self._ids.keys():
            self._ids = ids
            self.pool.update_routers(ids)

    def _find_address(self, router: RouterInfo) -> str | None:
        try:
            return self._setup.choose_address(router.addresses, peer_node_id=router.node_id)
        except ConfigError as error:
            _logger.warning("router %s cannot be used: %s", router.router_id, error)
            return None

    def _explain_unready(self) -> str | None:
        if not self.pool.num_connected:
            return "no router is connected"
        return self._unready_reason
