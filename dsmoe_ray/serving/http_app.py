"""The routes of the OpenAI-compatible API, and those beside it. Start here to see what can be asked for.

Headers: ``x-request-id`` names a call; it is made up where missing and always sent back, and a call without a seed that
comes again with the same id has the same tokens. ``x-request-timeout-ms`` (or ``grpc-timeout``) is how long the caller
will wait.
"""

import asyncio
import importlib.metadata
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.serving.gateway import Gateway
from dsmoe_ray.serving.generation_response import GenerationResponse
from dsmoe_ray.serving.http_edge import Authorize, Edge, JsonResponse, answer_error, read_body, read_timeout_s
from dsmoe_ray.serving.openai_api.errors import ApiError
from dsmoe_ray.serving.openai_api.responses import describe_model, describe_tokenizer, describe_tokens, list_models
from dsmoe_ray.serving.openai_api.types import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse_body

_SMALL_BYTES = 4 << 10
"""Bodies up to here are read between two tokens of others; larger ones on another thread."""


def build_http_app(gateway: Gateway, *, authorize: Authorize | None = None) -> FastAPI:
    """Return the application that serves a gateway.

    Args:
        gateway: What is behind it.
        authorize: Asked before everything but ``/health``; by default all callers may.
    """
    app = FastAPI(
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        middleware=[Middleware(Edge, metrics=gateway.metrics, authorize=authorize)],
        exception_handlers={HTTPException: _answer_http_error},
    )
    _add_generation_routes(app, gateway)
    _add_model_routes(app, gateway)
    _add_token_routes(app, gateway)
    _add_state_routes(app, gateway)
    return app


def _add_generation_routes(app: FastAPI, gateway: Gateway) -> None:
    planner = gateway.planner

    @app.post("/v1/completions", response_model=None)
    async def complete(request: Request) -> Response:
        return await _generate(
            gateway,
            request,
            lambda data, request_id: planner.plan_completion(parse_body(data, CompletionBody), request_id),
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        return await _generate(
            gateway,
            request,
            lambda data, request_id: planner.plan_chat(parse_body(data, ChatBody), request_id),
        )


async def _generate(gateway: Gateway, request: Request, plan: Any) -> Response:
    arrived_s = monotonic_s()
    timeout_s = read_timeout_s(request.headers, gateway.config)
    # Before the body is read, so that a refusal costs next to nothing.
    gateway.check_open()
    data = await read_body(request, gateway.config)
    call = await _off_loop(data, plan, data, request.state.request_id)
    return GenerationResponse(gateway, call, arrived_s=arrived_s, timeout_s=timeout_s)


def _add_model_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/v1/models", response_model=None)
    async def models() -> Response:
        return JsonResponse(list_models(gateway.model))

    # A name may hold slashes.
    @app.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> Response:
        gateway.planner.check_model_name(name)
        return JsonResponse(describe_model(gateway.model))


def _add_token_routes(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/tokenize", response_model=None)
    async def tokenize(request: Request) -> Response:
        data = await read_body(request, gateway.config)
        return JsonResponse(await _off_loop(data, _tokenize, gateway, data))

    @app.post("/detokenize", response_model=None)
    async def detokenize(request: Request) -> Response:
        data = await read_body(request, gateway.config)
        return JsonResponse(await _off_loop(data, _detokenize, gateway, data))

    @app.get("/tokenizer_info", response_model=None)
    async def tokenizer_info() -> Response:
        return JsonResponse(describe_tokenizer(gateway.model))


def _tokenize(gateway: Gateway, data: bytes) -> dict[str, Any]:
    body = parse_body(data, TokenizeBody)
    gateway.planner.check_model_name(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("give either prompt or messages.", param="prompt")
    if body.messages is not None:
        ids = gateway.planner.encode_messages(body.messages, add_generation_prompt=body.add_generation_prompt)
    else:
        assert body.prompt is not None
        ids = gateway.model.encode(body.prompt, parse_special=body.parse_special)
    return describe_tokens(gateway.model, ids, with_names=body.return_token_strs)


def _detokenize(gateway: Gateway, data: bytes) -> dict[str, Any]:
    body = parse_body(data, DetokenizeBody)
    gateway.planner.check_model_name(body.model)
    gateway.model.check_ids(body.tokens, param="tokens")
    return {"prompt": gateway.model.tokenizer.decode(body.tokens)}


def _add_state_routes(app: FastAPI, gateway: Gateway) -> None:
    version = importlib.metadata.version("dsmoe_ray")

    @app.api_route("/health", methods=["GET", "HEAD"], response_model=None)
    async def health() -> Response:
        return JsonResponse({"status": "ok"})

    @app.api_route("/ready", methods=["GET", "HEAD"], response_model=None)
    async def ready() -> Response:
        missing = gateway.explain_unready()
        if missing is not None:
            raise ApiError(f"not ready: {missing}.", status=503, kind="server_error", code="not_ready", retry_after_s=1)
        return JsonResponse({"status": "ready"})

    @app.get("/version", response_model=None)
    async def tell_version() -> Response:
        return JsonResponse({"version": version})

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(gateway.metrics.to_text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _off_loop(data: bytes, function: Any, *arguments: Any) -> Any:
    if len(data) <= _SMALL_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        told = ApiError(f"there is no {request.url.path[:200]!r} here.", status=404, code="not_found")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "other methods")
        told = ApiError(
            f"{request.method} is not allowed for {request.url.path[:200]!r}; {allowed} is.",
            status=405,
            code="method_not_allowed",
        )
    else:
        told = ApiError(str(error.detail), status=error.status_code)
    response = answer_error(told)
    response.headers.update(error.headers or {})
    return response
