"""The one door to connections: the address' scheme chooses what carries the frames.

A faster way to carry them (NCCL, RDMA, shared memory) is one more module with ``connect`` and a listener, and a scheme.
"""

from collections.abc import Sequence

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.wire import grpc_transport, memory_transport, tcp_transport, unix_transport
from dsmoe_ray.serving.wire.acceptance import Acceptance
from dsmoe_ray.serving.wire.codec import MAX_FRAME_BYTES
from dsmoe_ray.serving.wire.connection import Connection, HandleConnection, Listener
from dsmoe_ray.serving.wire.handshake import (
    HANDSHAKE_MAX_BYTES,
    HANDSHAKE_TIMEOUT_S,
    Hello,
    UnprovenConnection,
    check_secret,
    prove_to_listener,
)
from dsmoe_ray.serving.wire.tls import TlsFiles

DEFAULT_MAX_FRAME_BYTES = 64 << 20
SEND_TIMEOUT_S = 5.0
"""How long a peer may read nothing while we have more to say, before it is taken for hung."""


def open_connection(
    address: str,
    hello: Hello,
    *,
    secret: bytes,
    timeout_s: float,
    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
    send_timeout_s: float = SEND_TIMEOUT_S,
    tls: TlsFiles | None = None,
) -> Connection:
    """Connect to a listener and shake hands, all within ``timeout_s``.

    Raises:
        HandshakeError: the ends do not belong together; trying again will not help.
        ConnectionLostError: nobody listens there, or nobody answers in time.
    """
    _check_limits(secret, max_frame_bytes)
    deadline_s = monotonic_s() + timeout_s
    connection: UnprovenConnection
    if address.startswith(unix_transport.SCHEME):
        connection = unix_transport.connect(address, timeout_s=timeout_s, send_timeout_s=send_timeout_s)
    elif address.startswith(memory_transport.SCHEME):
        connection = memory_transport.connect(address, send_timeout_s=send_timeout_s)
    elif address.startswith(tcp_transport.SCHEME):
        _check_no_tls(address, tls)
        connection = tcp_transport.connect(address, timeout_s=timeout_s, send_timeout_s=send_timeout_s)
    elif address.startswith(grpc_transport.SCHEME):
        connection = grpc_transport.connect(
            address, send_timeout_s=send_timeout_s, max_frame_bytes=max_frame_bytes, tls=tls
        )
    else:
        raise _unknown(address)
    try:
        prove_to_listener(
            connection,
            hello,
            secret=secret,
            timeout_s=max(0.0, deadline_s - monotonic_s()),
            max_frame_bytes=max_frame_bytes,
        )
    except BaseException:
        connection.close()
        raise
    return connection


def open_listener(
    address: str,
    handle: HandleConnection,
    hello: Hello,
    *,
    secret: bytes,
    max_frame_bytes: int = DEFAULT_MAX_FRAME_BYTES,
    send_timeout_s: float = SEND_TIMEOUT_S,
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S,
    tls: TlsFiles | None = None,
) -> Listener:
    """Accept connections from peers that prove themselves, and call ``handle`` with each on a thread of its own.

    Raises:
        ConfigError: nobody can listen at such an address.
    """
    _check_limits(secret, max_frame_bytes)
    acceptance = Acceptance(
        handle=handle,
        hello=hello,
        secret=secret,
        max_frame_bytes=max_frame_bytes,
        handshake_timeout_s=handshake_timeout_s,
    )
    if address.startswith(unix_transport.SCHEME):
        return unix_transport.UnixListener(address, acceptance, send_timeout_s=send_timeout_s)
    if address.startswith(memory_transport.SCHEME):
        return memory_transport.MemoryListener(address, acceptance, send_timeout_s=send_timeout_s)
    if address.startswith(tcp_transport.SCHEME):
        _check_no_tls(address, tls)
        return tcp_transport.TcpListener(address, acceptance, send_timeout_s=send_timeout_s)
    if address.startswith(grpc_transport.SCHEME):
        return grpc_transport.GrpcListener(address, acceptance, send_timeout_s=send_timeout_s, tls=tls)
    raise _unknown(address)


def choose_address(
    addresses: Sequence[str], *, peer_node_id: str, node_id: str, same_node_transport: bool = True
) -> str:
    """Return the first of a peer's addresses, best first, that works from the node that asks.

    Args:
        addresses: As the peer announces them.
        peer_node_id: The machine of the peer.
        node_id: The machine of the one who asks.
        same_node_transport: Whether ends that share a machine may use a Unix socket.
    """
    for address in addresses:
        if address.startswith(unix_transport.SCHEME):
            usable = same_node_transport and node_id == peer_node_id
        elif address.startswith(memory_transport.SCHEME):
            usable = memory_transport.is_listening(address)
        else:
            usable = True
        if usable:
            return address
    raise ConfigError(
        f"none of the addresses {list(addresses)} of a peer on node {peer_node_id!r} works from node {node_id!r}; "
        "let it listen at grpc:// too"
    )


def _check_limits(secret: bytes, max_frame_bytes: int) -> None:
    check_secret(secret)
    if not HANDSHAKE_MAX_BYTES <= max_frame_bytes <= MAX_FRAME_BYTES:
        raise ConfigError(
            f"wire.max_frame_bytes must be between {HANDSHAKE_MAX_BYTES} and {MAX_FRAME_BYTES}; got {max_frame_bytes}"
        )


def _check_no_tls(address: str, tls: TlsFiles | None) -> None:
    if tls is not None:
        raise ConfigError(f"{address}: tcp:// knows no TLS; use grpc:// where certificates are configured")


def _unknown(address: str) -> ConfigError:
    return ConfigError(f"an address starts with unix://, tcp://, grpc:// or memory://; found {address!r}")
