"""Between sockets and routes: ids, access, errors, limits on bodies, deadlines. Knows no field of any body."""

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsmoe_ray.serving.config import HttpConfig
from dsmoe_ray.serving.gateway_metrics import GatewayMetrics
from dsmoe_ray.serving.openai_api.errors import ApiError, to_api_error

OPEN_PATHS = frozenset({"/health"})
"""What everyone may ask for."""
REQUEST_ID, TIMEOUT, GRPC_TIMEOUT = "x-request-id", "x-request-timeout-ms", "grpc-timeout"
ABORT_EXTENSION = "dsmoe.abort"
"""Among the extensions of a scope: cuts the connection; see ``http_protocol.py``."""

Authorize = Callable[[Mapping[str, str]], None]
"""Takes the headers of a request; raises ``ApiError`` if it may not go on."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
_GRPC_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_GRPC_UNITS_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

logger = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The one who asked has left; nobody reads an answer."""


class JsonResponse(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return content if isinstance(content, bytes) else json.dumps(content).encode()


def answer_error(error: ApiError) -> Response:
    """Return the answer to a call that fails."""
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return JsonResponse(error.to_json(), status_code=error.status, headers=headers)


class Edge:
    """The outermost layer: gives each request an id, asks whether it may go on, turns errors into answers, counts."""

    def __init__(self, app: ASGIApp, *, metrics: GatewayMetrics, authorize: Authorize | None = None) -> None:
        """Wrap an application; without ``authorize`` everyone may ask for everything."""
        self._app, self._metrics, self._authorize = app, metrics, authorize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            # Of the rest only the lifespan is ours; a web socket is refused by not being answered.
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        problem: ApiError | None = None
        try:
            request_id = read_request_id(headers)
        except ApiError as error:
            problem, request_id = error, read_request_id({})
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (REQUEST_ID.encode(), request_id.encode())]
            await send(message)

        try:
            if problem is not None:
                raise problem
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if self._authorize is not None and path not in OPEN_PATHS:
                self._authorize(headers)
            await self._app(scope, receive, send_named)
        except ClientGoneError:
            self._metrics.gone.inc()
        except Exception as error:  # Nothing above us answers.
            if status:
                raise
            answer = to_api_error(error)
            if answer.status == 500:
                logger.exception("request %s failed", request_id)
            await answer_error(answer)(scope, receive, send_named)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, status or "none").inc()


def read_request_id(headers: Mapping[str, str]) -> str:
    """Return how a call is named, by its caller or by us.

    Raises:
        ApiError: its caller gives it a name that cannot be.
    """
    given = headers.get(REQUEST_ID)
    if given is None:
        return secrets.token_hex(16)
    if _REQUEST_ID.fullmatch(given) is None:
        raise ApiError(
            f"{REQUEST_ID} must be 1 to 128 letters, digits or ._:/+=@-; found {given!r:.150}.", param=REQUEST_ID
        )
    return given


async def read_body(request: Request, config: HttpConfig) -> bytes:
    """Return the body of a request, no byte of it beyond the limit.

    Raises:
        ApiError: it is no JSON by its header, too large, or does not arrive in time.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also keeps web pages from calling a server on the machine of those who look at them.
        raise ApiError(
            f"content-type must be application/json; found {kind[:100] or 'none'!r}.",
            status=415,
            param="content-type",
        )
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > config.max_body_bytes):
        raise _refuse_size(config)
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                body += message.get("body", b"")
                if len(body) > config.max_body_bytes:
                    raise _refuse_size(config)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(
            f"the body did not arrive within {config.body_timeout_s:g} s.", status=408, code="timeout"
        ) from None


def read_timeout_s(headers: Mapping[str, str], config: HttpConfig) -> float:
    """Return how long a call may take: as its headers say, and at most what is allowed.

    Raises:
        ApiError: a header is no time.
    """
    timeouts = [config.max_request_s]
    text = headers.get(TIMEOUT)
    if text is not None:
        if not (text.isascii() and text.isdecimal() and len(text) <= 12 and int(text) > 0):
            raise ApiError(f"{TIMEOUT} must be a positive number of milliseconds; found {text[:100]!r}.", param=TIMEOUT)
        timeouts.append(int(text) / 1000)
    text = headers.get(GRPC_TIMEOUT)
    if text is not None:
        found = _GRPC_TIMEOUT.fullmatch(text)
        if found is None:
            raise ApiError(
                f"{GRPC_TIMEOUT} must be digits and a unit of H, M, S, m, u, n, such as 500m; found {text[:100]!r}.",
                param=GRPC_TIMEOUT,
            )
        timeouts.append(int(found[1]) * _GRPC_UNITS_S[found[2]])
    return min(timeouts)


def _refuse_size(config: HttpConfig) -> ApiError:
    return ApiError(
        f"the body is larger than {config.max_body_bytes} bytes, which is the most allowed.",
        status=413,
        code="body_too_large",
    )
