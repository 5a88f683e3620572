"""An HTTP server for an ASGI application inside a running event loop: uvicorn, with limits on what a head may hold."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dsmoe_ray.errors import UserError
from dsmoe_ray.serving.config import HttpConfig
from dsmoe_ray.serving.generation_response import ABORT_EXTENSION
from dsmoe_ray.serving.openai_api.errors import ApiError


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
        settings = uvicorn.Config(
            self._app,
            http=_limit_heads(self._config.max_header_bytes),
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
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


def _limit_heads(max_bytes: int) -> type[HttpToolsProtocol]:
    too_large = ApiError(
        f"the head of the request is larger than {max_bytes} bytes, which is the most allowed.",
        status=431,
        code="head_too_large",
    ).to_json()
    refusal = (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(too_large), too_large)
    )

    class LimitedProtocol(HttpToolsProtocol):
        """Counts the bytes of a request until its head is whole; uvicorn itself would take any number."""

        _num_head_bytes: int | None = 0
        """None while a body arrives."""

        def data_received(self, data: bytes) -> None:
            if self._num_head_bytes is not None:
                self._num_head_bytes += len(data)
            super().data_received(data)
            if self._num_head_bytes is not None and self._num_head_bytes > max_bytes:
                self.transport.write(refusal)
                self.transport.close()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._num_head_bytes = self._num_head_bytes or 0
            extensions: dict[str, Any] = {ABORT_EXTENSION: self.transport.abort}
            self.scope["extensions"] = extensions  # type: ignore[typeddict-item]

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._num_head_bytes = None

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._num_head_bytes = 0

    return LimitedProtocol
