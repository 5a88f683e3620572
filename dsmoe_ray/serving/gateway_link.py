"""One gateway as a router sees it: what it wants, and a bounded buffer of what it is told.

A thread of its own writes to the connection, so that the engine never waits for a gateway: steps that end while it
writes travel together in its next frame. A gateway that lets too much pile up is cut off.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import ConnectionLostError, FrameError
from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.serving.wire.connection import Connection
from dsmoe_ray.serving.wire.generation_codec import to_frame
from dsmoe_ray.serving.wire.messages import RejectedMessage, RouterStatusMessage
from dsmoe_ray.serving.wire.outputs_codec import pack_outputs

STATUS_INTERVAL_S = 0.5
"""The longest silence of a router that lives."""
_MAX_FRAME_OUTPUTS = 256
"""Keeps a frame's header far below its limit, whatever the outputs hold."""
_MAX_FRAME_SIZE = 1 << 16
"""Of characters and prompts' log probabilities in a frame, unless a single output has more."""

_logger = logging.getLogger(__name__)


Told = tuple[str, SequenceOutput]
"""An output, and what its gateway calls the request."""


class GatewayLink:
    """The connection of one gateway, from the moment it is there until it is lost."""

    def __init__(
        self, connection: Connection, read_status: Callable[[], RouterStatusMessage], *, max_buffered_outputs: int
    ) -> None:
        """Start to write.

        Args:
            connection: To the gateway.
            read_status: Says how busy the router is; called on the writing thread.
            max_buffered_outputs: More that are not written yet mean that the gateway does not read.
        """
        self.name = describe_peer(connection.peer)
        self._connection, self._read_status = connection, read_status
        self._max_buffered_outputs = max_buffered_outputs
        self._outbox: queue.SimpleQueue[list[Told] | RejectedMessage | None] = queue.SimpleQueue()
        """An empty list asks for the status, None for the end."""
        # Each is written by one thread only.
        self._num_pushed = self._num_written = 0
        self._is_closed = False
        self._status_due_s = 0.0
        self._thread = threading.Thread(target=self._run, name=f"to {self.name}", daemon=True)
        self._thread.start()

    def push_outputs(self, told: list[Told]) -> None:
        """Tell the gateway what a step has added; only from the engine's thread, and never waits."""
        self._num_pushed += len(told)
        num_buffered = self._num_pushed - self._num_written
        if num_buffered <= self._max_buffered_outputs:
            self._outbox.put(told)
        elif not self._is_closed:
            _logger.warning("%s does not read, %d outputs wait for it: it is cut off", self.name, num_buffered)
            self.close()

    def reject(self, rejected: RejectedMessage) -> None:
        """Tell the gateway that a request ends without its outputs; from any thread."""
        self._outbox.put(rejected)

    def send_status(self) -> None:
        """Tell the gateway at once how busy the router is; from any thread."""
        self._outbox.put([])

    def finish(self, timeout_s: float) -> None:
        """Write what there is to be written, for so long at most, and cut the connection."""
        self._outbox.put(None)
        self._thread.join(timeout_s)
        self.close()

    def close(self) -> None:
        """Cut the connection at once; whoever receives from it notices."""
        self._is_closed = True
        self._connection.close()
        self._outbox.put(None)

    def _run(self) -> None:
        try:
            while self._write_next():
                pass
        except (ConnectionLostError, FrameError) as error:
            if not self._is_closed:
                _logger.info("%s: nothing more can be sent: %s", self.name, error)
        finally:
            self._connection.close()

    def _write_next(self) -> bool:
        """Write the status if it is time, and what there is or comes soon; return False at the end."""
        now_s = monotonic_s()
        if now_s >= self._status_due_s:
            self._status_due_s = now_s + STATUS_INTERVAL_S
            self._connection.send(to_frame(self._read_status()))
        told: list[Told] = []
        try:
            item = self._outbox.get(timeout=max(0.001, self._status_due_s - now_s))
            # Steps that ended meanwhile travel together.
            while isinstance(item, list):
                told += item
                if not item:
                    self._status_due_s = 0.0
                item = self._outbox.get(block=False)
        except queue.Empty:
            self._write_outputs(told)
            return True
        self._write_outputs(told)
        if item is not None:
            self._connection.send(to_frame(item))
        return item is not None

    def _write_outputs(self, told: list[Told]) -> None:
        for part in cut(told):
            self._connection.send(pack_outputs([wire_id for wire_id, _ in part], [output for _, output in part]))
        self._num_written += len(told)


def cut(told: list[Told]) -> list[list[Told]]:
    """Return outputs in pieces that fit into a frame each, in order."""
    pieces: list[list[Told]] = []
    size = 0
    for one in told:
        size += _size_of(one[1])
        if not pieces or len(pieces[-1]) == _MAX_FRAME_OUTPUTS or size > _MAX_FRAME_SIZE:
            pieces.append([])
            size = _size_of(one[1])
        pieces[-1].append(one)
    return pieces


def _size_of(output: SequenceOutput) -> int:
    scores = output.prompt_logprobs
    return len(output.text) + (len(scores) * (1 + len(scores[0].top_logprobs)) if scores else 0)


def describe_peer(peer: Mapping[str, Any]) -> str:
    """Return what logs call the other end of a connection."""
    named = [f"{key} {value}" for key, value in peer.items() if key.endswith("_id")]
    return " ".join(["gateway", *named]) if named else "a gateway"
