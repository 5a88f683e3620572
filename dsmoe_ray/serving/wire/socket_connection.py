"""A connection over a stream socket, Unix or TCP.

Sockets block, and whoever wants a frame reads it from the kernel on their own thread: a queue or a thread in between
would double the round trip. Time limits are the kernel's too, for the same reason.
"""

import contextlib
import logging
import socket
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsmoe_ray.clock import monotonic_s, sleep_s
from dsmoe_ray.errors import ConnectionLostError, FrameError
from dsmoe_ray.serving.wire.acceptance import Acceptance
from dsmoe_ray.serving.wire.codec import encode_frame
from dsmoe_ray.serving.wire.connection import Buffer, Frame
from dsmoe_ray.serving.wire.frame_buffer import FrameBuffer
from dsmoe_ray.serving.wire.handshake import HANDSHAKE_MAX_BYTES

BACKLOG = 128
_SOCKET_BUFFER_BYTES = 4 << 20

_logger = logging.getLogger(__name__)


def connect_socket(
    sock: socket.socket, where: Any, *, address: str, timeout_s: float, send_timeout_s: float
) -> "SocketConnection":
    """Connect a new socket in time, and make a connection of it, without a handshake."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
        sock.connect(where)
    except OSError as error:
        sock.close()
        raise ConnectionLostError(f"cannot connect to {address}: {error.strerror or error}") from error
    return SocketConnection(sock, peer_name=address, send_timeout_s=send_timeout_s)


class SocketConnection:
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
            self._check_open()
            if self._received.is_empty and not self._read(timeout_s):
                return None
            while (frame := self._take_frame()) is None:
                if deadline_s is not None:
                    timeout_s = deadline_s - monotonic_s()
                if not self._read(timeout_s):
                    return None
            return frame

    def close(self) -> None:
        """End the stream."""
        if self._lost is None:
            self._lost = "it was closed at this end"
        with contextlib.suppress(OSError):  # The peer may be gone already.
            self._socket.shutdown(socket.SHUT_RDWR)
        # Woken by the shutdown, other threads are out of the socket in no time; its number may be reused only then.
        with self._send_lock, self._receive_lock:
            self._socket.close()

    def _take_frame(self) -> Frame | None:
        try:
            return self._received.take_frame()
        except FrameError as error:
            if self.peer:  # A failed handshake is logged by whoever shakes hands.
                _logger.warning("%s, %s, is cut off: %s", self._peer_name, self.peer, error)
            raise self._lose(f"it sent what is no frame; {error}") from error

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


class SocketAcceptor:
    """Makes a connection of every socket that a listening one accepts, until it is closed."""

    def __init__(
        self,
        listening: socket.socket,
        acceptance: Acceptance,
        *,
        address: str,
        send_timeout_s: float,
        prepare: Callable[[socket.socket], None],
    ) -> None:
        self._socket = listening
        self._acceptance = acceptance
        self._address = address
        self._send_timeout_s = send_timeout_s
        self._prepare = prepare
        self._closed = False
        self._thread = threading.Thread(target=self._accept_all, name=f"accept {address}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Accept no more, and close the connections that were accepted."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()
        self._acceptance.close()

    def _accept_all(self) -> None:
        while not self._closed:
            try:
                sock, _ = self._socket.accept()
                self._prepare(sock)
            except OSError as error:
                if self._closed:
                    return
                _logger.warning("%s cannot accept now: %s", self._address, error)
                sleep_s(0.1)  # Out of file descriptors, most likely; there may be some soon.
                continue
            caller = self._acceptance.name_caller(self._address)
            connection = SocketConnection(sock, peer_name=caller, send_timeout_s=self._send_timeout_s)
            self._acceptance.start(connection, caller=caller)


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
