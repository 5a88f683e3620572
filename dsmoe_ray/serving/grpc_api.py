"""The API over gRPC, for callers who do not speak HTTP; ``grpc_schema/generation.proto`` says what can be asked for.

It shares the gateway with the HTTP API: the same limits, the same routers, the same metrics. Errors are gRPC's codes,
with the rest of what HTTP tells in the trailing metadata.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable
from typing import Any

import grpc

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import DeadlineError, UserError
from dsmoe_ray.serving import grpc_messages as messages
from dsmoe_ray.serving.config import GrpcConfig
from dsmoe_ray.serving.gateway import Gateway, RunningCall
from dsmoe_ray.serving.grpc_calls import plan_call, to_reply
from dsmoe_ray.serving.http_edge import REQUEST_ID, Authorize, read_request_id
from dsmoe_ray.serving.openai_api.errors import ApiError, to_api_error

GENERATION, HEALTH = "dsmoe.v1.Generation", "grpc.health.v1.Health"

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_MAX_DETAILS = 2000
"""Characters of a message; more metadata than 8 KiB breaks a call."""
_SMALL_BYTES = 4 << 10
"""Requests up to here are read between two tokens of others; larger ones on another thread."""

_STALLED_S = 2.0
"""How long a client that does not read may hold a call beyond its deadline."""

_logger = logging.getLogger(__name__)


class GrpcApi:
    """A gRPC server in front of a gateway; of one event loop."""

    def __init__(
        self, gateway: Gateway, config: GrpcConfig, *, authorize: Authorize | None = None, shares_port: bool = False
    ) -> None:
        """Make a server that does not listen yet.

        Args:
            gateway: What is behind it.
            config: Where to listen.
            authorize: Is given the metadata of everything but the health; by default all callers may.
            shares_port: Whether other gateways of this machine may listen at the same port.
        """
        self._gateway, self._config, self._authorize = gateway, config, authorize
        self._shares_port = shares_port
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str | None:
        """Listen; return the address, ``host:port``, or None where no port is configured and nothing is done.

        Raises:
            UserError: the address cannot be had.
        """
        if self._config.port is None:
            return None
        options = [
            ("grpc.max_receive_message_length", self._gateway.config.max_body_bytes),
            ("grpc.so_reuseport", int(self._shares_port)),
        ]
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers(self._build_handlers())
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        try:
            port = server.add_insecure_port(f"{host}:{self._config.port}")
        except RuntimeError as error:
            raise UserError(
                f"cannot listen on {host}:{self._config.port}: {error}. Choose another grpc.port, or 0 for a free one."
            ) from error
        await server.start()
        self._server = server
        address = f"{host}:{port}"
        _logger.info("gRPC is served at %s", address)
        return address

    async def stop(self, grace_s: float = 0.0) -> None:
        """Take no more calls, and cancel those that are not over after ``grace_s``."""
        if self._server is not None:
            await self._server.stop(grace_s)

    def _build_handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        generate = grpc.unary_stream_rpc_method_handler(
            self._generate,
            request_deserializer=messages.GenerateRequest.FromString,
            response_serializer=messages.GenerateReply.SerializeToString,
        )
        list_models = grpc.unary_unary_rpc_method_handler(
            self._list_models,
            request_deserializer=messages.ListModelsRequest.FromString,
            response_serializer=messages.ListModelsReply.SerializeToString,
        )
        check = grpc.unary_unary_rpc_method_handler(
            self._check,
            request_deserializer=messages.HealthCheckRequest.FromString,
            response_serializer=messages.HealthCheckResponse.SerializeToString,
        )
        return (
            grpc.method_handlers_generic_handler(GENERATION, {"Generate": generate, "ListModels": list_models}),
            grpc.method_handlers_generic_handler(HEALTH, {"Check": check}),
        )

    async def _generate(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await self._answer("Generate", context, self._run(request, context))

    async def _list_models(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        async def answer() -> Any:
            self._check_access(context)
            model = self._gateway.model
            told = messages.Model(
                name=model.name, max_seq_len=model.config.max_seq_len, vocab_size=model.config.vocab_size
            )
            return messages.ListModelsReply(models=[told])

        return await self._answer("ListModels", context, answer())

    async def _check(self, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if request.service not in ("", GENERATION):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:200]!r} here.")
        status = "SERVING" if self._gateway.explain_unready() is None else "NOT_SERVING"
        return messages.HealthCheckResponse(status=status)

    async def _run(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        """Run a call and write its replies while its outputs come."""
        arrived_s = monotonic_s()
        gateway = self._gateway
        metadata = self._check_access(context)
        gateway.check_open()
        request_id = read_request_id(metadata)
        await context.send_initial_metadata(((REQUEST_ID, request_id),))
        is_small = request.ByteSize() <= _SMALL_BYTES
        call = (
            plan_call(gateway.planner, request, request_id)
            if is_small
            else await asyncio.to_thread(plan_call, gateway.planner, request, request_id)
        )
        left_s = context.time_remaining()
        most_s = gateway.config.max_request_s
        deadline_s = most_s if left_s is None else min(most_s, max(left_s, 0.001))
        async with gateway.run(call, deadline_s=deadline_s) as running:
            try:
                # Whoever does not read holds it up no longer than that.
                async with asyncio.timeout(deadline_s + _STALLED_S):
                    await self._write(running, context, arrived_s)
            except TimeoutError as error:
                raise DeadlineError(f"the call did not end within its {deadline_s:g} s.") from error
            finally:
                gateway.metrics.duration.observe(monotonic_s() - arrived_s)

    async def _write(self, running: RunningCall, context: grpc.aio.ServicerContext, arrived_s: float) -> None:
        metrics, is_first = self._gateway.metrics, True
        while (outputs := await running.next_outputs()) is not None:
            if not outputs:
                continue
            if is_first:
                is_first = False
                metrics.time_to_first_token.observe(monotonic_s() - arrived_s)
            metrics.generated_tokens.inc(sum(output.token is not None for _, output in outputs))
            await context.write(to_reply(output for _, output in outputs))

    def _check_access(self, context: grpc.aio.ServicerContext) -> dict[str, str]:
        """Return the metadata of a call that may go on."""
        pairs = context.invocation_metadata() or ()
        metadata = {key: value for key, value in pairs if isinstance(value, str)}
        if self._authorize is not None:
            self._authorize(metadata)
        return metadata

    async def _answer(self, method: str, context: grpc.aio.ServicerContext, answer: Awaitable[Any]) -> Any:
        """Wait for an answer; turn errors into codes, and count."""
        status = grpc.StatusCode.CANCELLED
        try:
            told = await answer
            status = grpc.StatusCode.OK
            return told
        except Exception as error:
            problem = to_api_error(error)
            status = _CODES.get(problem.status, grpc.StatusCode.INTERNAL)
            if status is grpc.StatusCode.INTERNAL:
                _logger.exception("%s failed", method)
            await context.abort(status, str(problem)[:_MAX_DETAILS], _to_metadata(problem))
        finally:
            if status is grpc.StatusCode.CANCELLED:
                self._gateway.metrics.gone.inc()
            self._gateway.metrics.requests.labels(f"grpc {method}", status.name).inc()


def _to_metadata(problem: ApiError) -> tuple[tuple[str, str], ...]:
    told = {"dsmoe-code": problem.code, "dsmoe-param": problem.param, "retry-after": problem.retry_after_s}
    # Other characters are not allowed there.
    return tuple(
        (key, re.sub(r"[^\x20-\x7e]", "?", str(value))[:200]) for key, value in told.items() if value is not None
    )
