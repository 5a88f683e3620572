"""An HTTP server for an ASGI application inside a running event loop: uvicorn, as we want it."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from dsmoe_ray.errors import UserError
from dsmoe_ray.serving.config import HttpConfig
from dsmoe_ray.serving.http_protocol import LimitedConfig, LimitedProtocol


class HttpServer:
    """Serves an application until it is stopped; leaves signals to others."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._app, self._config = app, config
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Listen, and return the base of all URLs, without a slash at its end.

        Raises:
            UserError: the address cannot be had.
        """
        listener = _listen(self._config)
        host, port = listener.getsockname()[:2]
        settings = LimitedConfig(
            self._app,
            limits=self._config,
            http=LimitedProtocol,
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
            # Longer than clients keep an idle connection, so that none is closed while it is taken up again.
            timeout_keep_alive=75,
        )
        self._server = _Server(settings)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.005)
        if self._serving.done():
            self._serving.result()
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def stop(self) -> None:
        """Close all connections; those who drain first lose no answer."""
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await self._serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process."""
        yield


def _listen(config: HttpConfig) -> socket.socket:
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        family, kind, protocol, _, address = found[0]
        # Event loops send small packets at once only if the protocol is named.
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _refuse_address(config, error) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise _refuse_address(config, error) from error
    return listener


def _refuse_address(config: HttpConfig, error: OSError) -> UserError:
    return UserError(
        f"cannot listen on {config.host}:{config.port}: {error.strerror or error}. Choose another http.port, or 0 for "
        "a free one."
    )
