"""What uvicorn does with the bytes of a connection, and bounds on the head of a request that it does not have."""

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dsmoe_ray.serving.config import HttpConfig
from dsmoe_ray.serving.http_edge import ABORT_EXTENSION
from dsmoe_ray.serving.openai_api.errors import ApiError

_LINGER_S = 1.0
"""How long the rest of a request is thrown away after its answer; a connection closed at once could lose the answer."""


class LimitedConfig(uvicorn.Config):
    """Settings of uvicorn, and ours."""

    def __init__(self, app: Any, *, limits: HttpConfig, **settings: Any) -> None:
        super().__init__(app, **settings)
        self.limits = limits
        self.invalid = _write_refusal(b"400 Bad Request", "this is no HTTP request.")
        self.too_large = _write_refusal(
            b"431 Request Header Fields Too Large",
            f"the head of the request is larger than {limits.max_header_bytes} bytes, which is the most allowed.",
        )


class LimitedProtocol(HttpToolsProtocol):
    """Bounds the head of a request in bytes and in time, and a body that nobody wants in time."""

    config: LimitedConfig
    _num_head_bytes: int | None = 0
    """None while a body arrives or an answer leaves."""
    _head_timer: asyncio.TimerHandle | None = None
    _linger_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        super().connection_lost(exc)
        self._forget_timer()
        if self._linger_timer is not None:
            self._linger_timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Take bytes; count them while they belong to a head."""
        if self._num_head_bytes is not None:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes is not None and self._num_head_bytes > self.config.limits.max_header_bytes:
            self._refuse(self.config.too_large)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP as everything else is refused."""
        self._refuse(self.config.invalid)

    def on_message_begin(self) -> None:
        """Start a request."""
        super().on_message_begin()
        self._expect_head()
        self.scope["extensions"] = {ABORT_EXTENSION: self.transport.abort}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """Start an answer."""
        super().on_headers_complete()
        self._num_head_bytes = None
        self._forget_timer()

    def on_message_complete(self) -> None:
        """Be ready for the next head."""
        super().on_message_complete()
        self._num_head_bytes = 0
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
            self._expect_head()

    def on_response_complete(self) -> None:
        """Throw away what comes of a body that was not wanted."""
        super().on_response_complete()
        if self.cycle.more_body and not self.transport.is_closing():
            self._linger_timer = self.loop.call_later(_LINGER_S, self.transport.close)

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.config.limits.body_timeout_s, self.transport.abort)

    def _forget_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()


def _write_refusal(status: bytes, message: str) -> bytes:
    body = ApiError(message).to_json()
    head = b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body
