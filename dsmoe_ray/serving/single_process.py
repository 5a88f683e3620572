"""The whole application in one process and without Ray: gateway, router and experts, joined by ``memory://``.

It is the same gateway and the same router as on a cluster. The event loop of the gateway and the thread of the engine
share this process; while a step computes, the loop has the interpreter.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.serving.config import ServingConfig
from dsmoe_ray.serving.control import RouterInfo
from dsmoe_ray.serving.gateway import Gateway
from dsmoe_ray.serving.grpc_api import GrpcApi
from dsmoe_ray.serving.http_app import build_http_app
from dsmoe_ray.serving.http_server import HttpServer
from dsmoe_ray.serving.openai_api.served_model import load_served_model
from dsmoe_ray.serving.router_pool import RouterPool
from dsmoe_ray.serving.router_service import RouterLimits, RouterService
from dsmoe_ray.serving.wire.connection import Connection
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.transport import open_connection, open_listener

_NODE_ID = "this process"
_CONNECT_TIMEOUT_S = 10.0


@contextlib.asynccontextmanager
async def run_single_process(config: ServingConfig) -> AsyncIterator[str]:
    """Serve while the context lasts; yields the base of all URLs. Calls under way end before it does.

    Raises:
        ArtifactError: the artifact cannot be read.
        UserError: the address cannot be had.
    """
    model = load_served_model(config.artifact, name=config.model_name)
    engine = await asyncio.to_thread(lambda: load_engine(load_artifact(config.artifact), config.engine))
    # Nobody else can reach memory://, and nobody else may be mistaken for this process.
    secret, digest = secrets.token_bytes(32), secrets.token_hex(8)
    router = RouterService(
        engine,
        RouterInfo(router_id="router", addresses=(), node_id=_NODE_ID),
        limits=RouterLimits(max_request_s=config.http.max_request_s),
    )
    listener = open_listener(
        f"memory://router-{digest}", router.handle, Hello(role="router", model_digest=digest), secret=secret
    )
    router.serve(listener)
    router.start()

    def connect(address: str) -> Connection:
        hello = Hello(role="gateway", model_digest=digest)
        return open_connection(address, hello, secret=secret, timeout_s=_CONNECT_TIMEOUT_S)

    pool = RouterPool(connect)
    gateway = Gateway(
        pool,
        model,
        config.http,
        max_sequences=config.engine.max_num_seqs,
        explain_unready=lambda: None if pool.num_connected else "the engine is not there",
    )
    server, grpc_api = HttpServer(build_http_app(gateway), config.http), GrpcApi(gateway, config.grpc)
    try:
        pool.update_routers([listener.address])
        await grpc_api.start()
        yield await server.start()
        await gateway.drain(config.http.drain_s)
        await server.stop()
    finally:
        await grpc_api.stop()
        pool.close()
        await asyncio.to_thread(router.close)
