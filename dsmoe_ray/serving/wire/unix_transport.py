"""Frames over Unix sockets: the fastest way between two processes of one machine, guarded by file permissions.

Sockets block, and whoever wants a frame reads it from the kernel on their own thread: a queue or a thread in between
would double the round trip. Time limits are the kernel's too, for the same reason.
"""

import contextlib
import errno
import logging
import os
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe_ray.clock import monotonic_s, sleep_s
from dsmoe_ray.errors import ConfigError, ConnectionLostError, FrameError
from dsmoe_ray.serving.wire.acceptance import Acceptance
from dsmoe_ray.serving.wire.codec import encode_frame
from dsmoe_ray.serving.wire.connection import Buffer, Frame
from dsmoe_ray.serving.wire.frame_buffer import FrameBuffer
from dsmoe_ray.serving.wire.handshake import HANDSHAKE_MAX_BYTES

SCHEME = "unix://"
_SOCKET_BUFFER_BYTES = 4 << 20
_BACKLOG = 128
_MAX_PATH_BYTES = 90
"""Of the 107 that the kernel allows; the rest is for a name to be born under."""

_logger = logging.getLogger(__name__)


def connect(address: str, *, timeout_s: float, send_timeout_s: float) -> "UnixConnection":
    """Connect to a listener, without a handshake."""
    path = path_of(address)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        raise ConnectionLostError(f"cannot connect to {address}: {error.strerror or error}") from error
    return UnixConnection(sock, peer_name=address, send_timeout_s=send_timeout_s)


def path_of(address: str) -> Path:
    """Return the socket file that an address names."""
    path = address.removeprefix(SCHEME)
    if not path.startswith("/"):
        raise ConfigError(f"a Unix address looks like unix:///path/to.sock; found {address!r}")
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise ConfigError(
            f"{path}: a socket's path may take at most {_MAX_PATH_BYTES} bytes; choose a shorter directory"
        )
    return Path(path)


class UnixConnection:
    """One end of a stream of frames; see ``Connection``."""

    def __init__(self, sock: socket.socket, *, peer_name: str, send_timeout_s: float) -> None:
        self.peer: Mapping[str, Any] = {}
        self._peer_name = peer_name
        self._socket = sock
        self._send_lock = threading.Lock()
        self._receive_lock = threading.Lock()
        self._lost: str | None = None
        self._max_sent_bytes = HANDSHAKE_MAX_BYTES
        self._received = FrameBuffer(HANDSHAKE_MAX_BYTES)
        self._receive_timeout_s: float | None = None
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(send_timeout_s))

    def establish(self, peer: Mapping[str, Any], *, max_sent_bytes: int, max_received_bytes: int) -> None:
        """Take down who the peer is, and the limits from now on."""
        self.peer = peer
        self._max_sent_bytes = max_sent_bytes
        self._received.max_frame_bytes = max_received_bytes

    def send(self, frame: Frame) -> None:
        """Send a frame."""
        parts, num_bytes = encode_frame(frame, self._max_sent_bytes)
        with self._send_lock:
            self._check_open()
            try:
                sent = self._socket.send(parts[0]) if len(parts) == 1 else self._socket.sendmsg(parts)
                while sent < num_bytes:
                    parts, num_bytes = _rest(parts, sent), num_bytes - sent
                    sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                raise self._lose("it reads nothing; taken for hung") from None
            except OSError as error:
                raise self._lose(error.strerror or str(error)) from error

    def receive(self, timeout_s: float | None = None) -> Frame | None:
        """Return the next frame, None if there is none within ``timeout_s``."""
        with self._receive_lock:
            deadline_s = None if timeout_s is None else monotonic_s() + timeout_s
            while True:
                self._check_open()
                try:
                    frame = self._received.take_frame()
                except FrameError as error:
                    if self.peer:  # A failed handshake is logged by whoever shakes hands.
                        _logger.warning("%s, %s, is cut off: %s", self._peer_name, self.peer, error)
                    raise self._lose(f"it sent what is no frame; {error}") from error
                if frame is not None:
                    return frame
                if not self._read(timeout_s):
                    return None
                if deadline_s is not None:
                    timeout_s = deadline_s - monotonic_s()

    def close(self) -> None:
        """End the stream."""
        if self._lost is None:
            self._lost = "it was closed at this end"
        with contextlib.suppress(OSError):  # The peer may be gone already.
            self._socket.shutdown(socket.SHUT_RDWR)
        # Woken by the shutdown, other threads are out of the socket in no time; its number may be reused only then.
        with self._send_lock, self._receive_lock:
            self._socket.close()

    def _read(self, timeout_s: float | None) -> bool:
        """Receive some bytes; False if none came in time."""
        # The rest of a large frame is waited for in the kernel, however many pieces it comes in.
        flags = socket.MSG_WAITALL if self._received.wants_all else 0
        try:
            if timeout_s is not None and timeout_s <= 0:
                flags = socket.MSG_DONTWAIT
            elif timeout_s != self._receive_timeout_s:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout_s or 0.0))
                self._receive_timeout_s = timeout_s
            num_bytes = self._socket.recv_into(self._received.space(), 0, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._lose(error.strerror or str(error)) from error
        if not num_bytes:
            raise self._lose("it closed the connection")
        self._received.filled(num_bytes)
        return True

    def _check_open(self) -> None:
        if self._lost is not None:
            raise ConnectionLostError(f"connection to {self._peer_name} is lost: {self._lost}")

    def _lose(self, reason: str) -> ConnectionLostError:
        """Give the connection up, so that both directions and both ends know."""
        if self._lost is None:
            self._lost = reason
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        return ConnectionLostError(f"connection to {self._peer_name} is lost: {self._lost}")


class UnixListener:
    """Accepts connections on a socket file that only its owner may use; see ``Listener``."""

    def __init__(self, address: str, acceptance: Acceptance, *, send_timeout_s: float) -> None:
        self.address = address
        self._path = path_of(address)
        self._acceptance = acceptance
        self._send_timeout_s = send_timeout_s
        self._closed = False
        self._socket = _listen(self._path)
        self._inode = self._path.stat().st_ino
        self._thread = threading.Thread(target=self._accept_all, name=f"accept {self._path.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept no more, and close the connections that were accepted."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        self._acceptance.close()

    def _accept_all(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._socket.accept()
            except OSError as error:
                if self._closed:
                    return
                _logger.warning("%s cannot accept now: %s", self.address, error)
                sleep_s(0.1)  # Out of file descriptors, most likely; there may be some soon.
                continue
            caller = self._acceptance.name_caller(self.address)
            connection = UnixConnection(sock, peer_name=caller, send_timeout_s=self._send_timeout_s)
            self._acceptance.start(connection, caller=caller)


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
        sock.listen(_BACKLOG)
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


def _rest(parts: Sequence[Buffer], sent: int) -> list[Buffer]:
    """Return what is left of buffers when so many of their bytes are gone."""
    rest: list[Buffer] = []
    for part in parts:
        view = memoryview(part).cast("B")
        if sent < len(view):
            rest.append(view[sent:])
        sent = max(0, sent - len(view))
    return rest


def _timeval(duration_s: float) -> bytes:
    """Return a ``struct timeval``; zero means no limit, so a short time is rounded up."""
    micros = max(1, round(duration_s * 1e6)) if duration_s else 0
    return struct.pack("@ll", micros // 1_000_000, micros % 1_000_000)
