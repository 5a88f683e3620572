"""Frames over gRPC: one bidirectional stream, on a TCP connection of its own, for each connection.

Two threads serve a connection: gRPC's own takes what is to be sent from one queue, ours puts what comes into the other.
(To queue a message where gRPC deserializes it saves a thread's turn and costs more: two threads then wake at once, and
fight for the interpreter.)
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import grpc

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.wire.acceptance import MAX_CONNECTIONS, Acceptance
from dsmoe_ray.serving.wire.byte_queue import ByteQueue
from dsmoe_ray.serving.wire.queued_connection import MAX_QUEUED_BYTES, QueuedConnection
from dsmoe_ray.serving.wire.tls import TlsFiles

SCHEME = "grpc://"
_SERVICE, _METHOD = "dsmoe.Wire", "Connect"
_PING_EVERY_MS = 2000
_PING_TIMEOUT_MS = 4000
"""A peer that answers no ping for so long is gone. On a machine with too much to do a second is nothing."""
_CLOSE_GRACE_S = 2.0
"""How long the other end may take to read what was sent before this end closed."""


def connect(address: str, *, send_timeout_s: float, max_frame_bytes: int, tls: TlsFiles | None) -> "GrpcConnection":
    """Start a stream to a listener, without a handshake; that nobody listens shows in the first ``receive``."""
    # A pool of its own keeps connections to one address from sharing a TCP connection.
    options = [*_options(max_frame_bytes), ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    channel = _open_channel(_target_of(address), options, tls)
    connection = GrpcConnection(peer_name=address, send_timeout_s=send_timeout_s)
    call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")(connection.outgoing(), wait_for_ready=False)
    connection.set_cancel(call.cancel)
    threading.Thread(
        target=_read_replies, args=(connection, call, channel), name=f"read {address}", daemon=True
    ).start()
    return connection


class GrpcConnection(QueuedConnection):
    """One end of a stream of frames; see ``Connection``."""

    def __init__(self, *, peer_name: str, send_timeout_s: float) -> None:
        sent: ByteQueue[bytes] = ByteQueue(MAX_QUEUED_BYTES)
        received: ByteQueue[bytes] = ByteQueue(MAX_QUEUED_BYTES)
        super().__init__(sent, received, peer_name=peer_name, send_timeout_s=send_timeout_s)
        self._cancel: Callable[[], object] = bool

    def set_cancel(self, cancel: Callable[[], object]) -> None:
        """Take down how to end the stream for good."""
        self._cancel = cancel

    def lose(self, reason: str) -> None:
        """Give the connection up: what was sent before goes out if the other end reads it soon."""
        first = not self._closed
        super().lose(reason)
        if first:
            grace = threading.Timer(_CLOSE_GRACE_S, self._cancel)
            grace.daemon = True
            grace.start()

    def outgoing(self) -> Iterator[bytes]:
        """Yield what is to be sent until the connection ends."""
        while (message := self._sent.get()) is not None:
            yield message

    def read(self, stream: Iterable[bytes]) -> None:
        """Move what the other end sends to the queue, until it has said all."""
        for message in stream:
            # While the queue is full no message is asked for, and the flow control of HTTP/2 slows the sender.
            self._received.put(message, max(1, len(message)), None)


class GrpcListener:
    """Accepts connections on a TCP port; see ``Listener``."""

    def __init__(self, address: str, acceptance: Acceptance, *, send_timeout_s: float, tls: TlsFiles | None) -> None:
        self._acceptance = acceptance
        self._send_timeout_s = send_timeout_s
        methods = {_METHOD: grpc.stream_stream_rpc_method_handler(self._run)}
        self._server = grpc.server(
            _ThreadPerStream(),
            handlers=[grpc.method_handlers_generic_handler(_SERVICE, methods)],
            options=[*_options(acceptance.max_frame_bytes), ("grpc.so_reuseport", 0)],
            maximum_concurrent_rpcs=MAX_CONNECTIONS,
        )
        self.address = f"{SCHEME}{_host_of(address)}:{self._bind(address, tls)}"
        self._server.start()

    def close(self) -> None:
        """Accept no more, and close the connections that were accepted."""
        stopped = self._server.stop(_CLOSE_GRACE_S)
        self._acceptance.close()
        stopped.wait()

    def _bind(self, address: str, tls: TlsFiles | None) -> int:
        target = _target_of(address)
        try:
            if tls is None:
                return int(self._server.add_insecure_port(target))
            return int(self._server.add_secure_port(target, _server_credentials(tls)))
        except RuntimeError as error:
            raise ConfigError(f"{address}: cannot listen there; choose another host or port: {error}") from error

    def _run(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        caller = self._acceptance.name_caller(self.address)
        connection = GrpcConnection(peer_name=caller, send_timeout_s=self._send_timeout_s)
        connection.set_cancel(context.cancel)
        context.add_callback(connection.end)
        threading.Thread(target=_read_requests, args=(connection, requests), name=f"read {caller}", daemon=True).start()
        self._acceptance.start(connection, caller=caller)
        return connection.outgoing()


class _ThreadPerStream(Executor):
    """Runs each stream's sender on a thread that does not keep the process alive, as those of a thread pool do."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a function on a new thread."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # noqa: BLE001 - it is for whoever asks for the result.
                future.set_exception(error)

        threading.Thread(target=run, name="send", daemon=True).start()
        return future


def _read_requests(connection: GrpcConnection, requests: Iterator[bytes]) -> None:
    try:
        connection.read(requests)
        connection.end()
    except grpc.RpcError:
        connection.end("the other end is gone")


def _read_replies(connection: GrpcConnection, call: grpc.Call, channel: grpc.Channel) -> None:
    try:
        connection.read(call)
        connection.end()
    except grpc.RpcError:
        connection.end(f"{call.code().name}: {call.details()}")
    channel.close()


def _options(max_frame_bytes: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", max_frame_bytes),
        ("grpc.max_send_message_length", max_frame_bytes),
        # A peer that answers no ping is gone, whatever TCP says.
        ("grpc.keepalive_time_ms", _PING_EVERY_MS),
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        # The pings of this probe would stand in the way of those above, and add traffic; the window is fixed instead.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _PING_EVERY_MS // 2),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.max_frame_size", 1 << 20),
        ("grpc.http2.lookahead_bytes", 4 << 20),
        ("grpc.enable_retries", 0),
    ]


def _open_channel(target: str, options: list[tuple[str, Any]], tls: TlsFiles | None) -> grpc.Channel:
    if tls is None:
        return grpc.insecure_channel(target, options)
    if tls.server_name is not None:
        options = [*options, ("grpc.ssl_target_name_override", tls.server_name)]
    authority, key, certificate = _read_files(tls)
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(authority, key, certificate), options)


def _server_credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    authority, key, certificate = _read_files(tls)
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)


def _read_files(tls: TlsFiles) -> tuple[bytes, bytes, bytes]:
    try:
        return tls.authority.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot read it for TLS: {error.strerror}") from error


def _target_of(address: str) -> str:
    target = address.removeprefix(SCHEME)
    if not target.rpartition(":")[2].isdecimal() or not _host_of(address):
        raise ConfigError(f"a gRPC address looks like grpc://host:port; found {address!r}")
    return target


def _host_of(address: str) -> str:
    return address.removeprefix(SCHEME).rpartition(":")[0]
