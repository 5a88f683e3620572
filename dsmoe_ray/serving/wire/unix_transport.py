"""Frames over Unix sockets: the fastest way between two processes of one machine, guarded by file permissions."""

import contextlib
import errno
import os
import socket
from pathlib import Path

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.wire.acceptance import Acceptance
from dsmoe_ray.serving.wire.socket_connection import BACKLOG, SocketAcceptor, SocketConnection, connect_socket

SCHEME = "unix://"
_MAX_PATH_BYTES = 90
"""Of the 107 that the kernel allows; the rest is for a name to be born under."""


def connect(address: str, *, timeout_s: float, send_timeout_s: float) -> SocketConnection:
    """Connect to a listener, without a handshake."""
    path = _path_of(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    return connect_socket(sock, str(path), address=address, timeout_s=timeout_s, send_timeout_s=send_timeout_s)


class UnixListener:
    """Accepts connections on a socket file that only its owner may use; see ``Listener``."""

    def __init__(self, address: str, acceptance: Acceptance, *, send_timeout_s: float) -> None:
        self.address = address
        self._path = _path_of(address)
        listening = _listen(self._path)
        self._inode = self._path.stat().st_ino
        self._acceptor = SocketAcceptor(
            listening, acceptance, address=address, send_timeout_s=send_timeout_s, prepare=_leave_as_it_is
        )

    def close(self) -> None:
        """Accept no more, and close the connections that were accepted."""
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        self._acceptor.close()


def _path_of(address: str) -> Path:
    path = address.removeprefix(SCHEME)
    if not path.startswith("/"):
        raise ConfigError(f"a Unix address looks like unix:///path/to.sock; found {address!r}")
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise ConfigError(
            f"{path}: a socket's path may take at most {_MAX_PATH_BYTES} bytes; choose a shorter directory"
        )
    return Path(path)


def _leave_as_it_is(sock: socket.socket) -> None:
    """Prepare an accepted socket: nothing is to be done."""


def _listen(path: Path) -> socket.socket:
    """Listen under a name of our own, make it private, and only then move it to where it is looked for.

    So there is no moment when others may connect, and a file left by a dead process is replaced.
    """
    if _is_listening(path):
        raise ConfigError(f"{path}: another process listens there; choose another path or stop it")
    born = path.with_name(f"{path.name}.{os.getpid()}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(str(born))
        born.chmod(0o600)
        sock.listen(BACKLOG)
        born.rename(path)
    except OSError as error:
        sock.close()
        born.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot listen there: {error.strerror or error}") from error
    return sock


def _is_listening(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        # EAGAIN: somebody listens, and is too busy to accept.
        return probe.connect_ex(str(path)) in {0, errno.EAGAIN}
