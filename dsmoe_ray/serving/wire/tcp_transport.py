"""Frames over TCP, without TLS: the fastest way between machines of one network that is trusted.

Ends prove in the handshake that they know the secret, but what follows can be read and changed on its way.
"""

import socket
from typing import Any

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.wire.acceptance import Acceptance
from dsmoe_ray.serving.wire.socket_connection import BACKLOG, SocketAcceptor, SocketConnection, connect_socket

SCHEME = "tcp://"
_IDLE_S = 2
"""A machine that answers no probe for twice that long is gone."""


def connect(address: str, *, timeout_s: float, send_timeout_s: float) -> SocketConnection:
    """Connect to a listener, without a handshake."""
    family, where = _resolve(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    _prepare(sock)
    return connect_socket(sock, where, address=address, timeout_s=timeout_s, send_timeout_s=send_timeout_s)


class TcpListener:
    """Accepts connections on a TCP port; see ``Listener``."""

    def __init__(self, address: str, acceptance: Acceptance, *, send_timeout_s: float) -> None:
        family, where = _resolve(address)
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            # A port that a process has just left can be taken again; one that is in use cannot.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(where)
            listening.listen(BACKLOG)
        except OSError as error:
            listening.close()
            raise ConfigError(f"{address}: cannot listen there: {error.strerror or error}; choose another") from error
        self.address = f"{SCHEME}{_split(address)[0]}:{listening.getsockname()[1]}"
        self._acceptor = SocketAcceptor(
            listening, acceptance, address=self.address, send_timeout_s=send_timeout_s, prepare=_prepare
        )

    def close(self) -> None:
        """Accept no more, and close the connections that were accepted."""
        self._acceptor.close()


def _prepare(sock: socket.socket) -> None:
    """Send at once, and notice a machine that is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    limits = {"TCP_KEEPIDLE": _IDLE_S, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": _IDLE_S, "TCP_USER_TIMEOUT": 2000 * _IDLE_S}
    for name, value in limits.items():
        if hasattr(socket, name):  # Not every system has all of them.
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _resolve(address: str) -> tuple[socket.AddressFamily, Any]:
    host, port = _split(address)
    try:
        family, _, _, _, where = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"{address}: there is no such host: {error.strerror or error}") from error
    return family, where


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix(SCHEME).rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"a TCP address looks like tcp://host:port; found {address!r}")
    return host, int(port)
