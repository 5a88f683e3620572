"""The least that a round trip can cost: so many bytes there and so many back, with nothing around them.

Runs as ``python -m dsmoe_ray.bench.bare_echo TRANSPORT ADDRESS REQUEST_BYTES REPLY_BYTES`` for one client, which is
``connect_unix`` or ``connect_grpc``. The one place beside the transports that imports grpc: its subject is grpc alone.
"""

import queue
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from dsmoe_ray.errors import BenchError

_METHOD = "/bench.Echo/Stream"
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

RoundTrip = Callable[[], None]


@contextmanager
def start_echo(transport: str, address: str, *, request_bytes: int, reply_bytes: int) -> Iterator[RoundTrip]:
    """Start an echo in a process of its own; yields one round trip. It ends with the block.

    Args:
        transport: ``unix`` or ``grpc``.
        address: A path, or host and port.
        request_bytes: Sent there.
        reply_bytes: Sent back.
    """
    command = [sys.executable, "-m", "dsmoe_ray.bench.bare_echo", transport, address]
    process = subprocess.Popen(
        [*command, str(request_bytes), str(reply_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        if not process.stdout.readline():
            raise BenchError(f"the bare echo over {transport} ended with code {process.wait()}")
        connect = _connect_unix if transport == "unix" else _connect_grpc
        with connect(address, bytes(request_bytes), reply_bytes) as round_trip:
            yield round_trip
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@contextmanager
def _connect_unix(path: str, request: bytes, reply_bytes: int) -> Iterator[RoundTrip]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(path)
        reply = bytearray(reply_bytes)

        def round_trip() -> None:
            connection.sendall(request)
            _receive(connection, reply)

        yield round_trip


@contextmanager
def _connect_grpc(address: str, request: bytes, reply_bytes: int) -> Iterator[RoundTrip]:
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        replies = channel.stream_stream(_METHOD)(iter(requests.get, None))

        def round_trip() -> None:
            requests.put(request)
            if len(next(replies)) != reply_bytes:
                raise BenchError("the bare echo answered with another size")

        yield round_trip
        requests.put(None)


def _serve_unix(path: str, request_bytes: int, reply: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(1)
        _say_ready()
        connection, _ = listener.accept()
        request = bytearray(request_bytes)
        while _receive(connection, request):
            connection.sendall(reply)


def _serve_grpc(address: str, request_bytes: int, reply: bytes) -> None:
    def stream(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for _ in requests:
            yield reply

    service, name = _METHOD[1:].split("/")
    handlers = {name: grpc.stream_stream_rpc_method_handler(stream)}
    server = grpc.server(ThreadPoolExecutor(1), options=_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    server.add_insecure_port(address)
    server.start()
    _say_ready()
    server.wait_for_termination()


def _receive(connection: socket.socket, into: bytearray) -> bool:
    view = memoryview(into)
    while view:
        count = connection.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


def _say_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _transport, _address, _request_bytes, _reply_bytes = sys.argv[1:]
    _serve = _serve_unix if _transport == "unix" else _serve_grpc
    _serve(_address, int(_request_bytes), bytes(int(_reply_bytes)))
