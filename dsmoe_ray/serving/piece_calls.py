"""One layer's call, cut into pieces, and the way of each piece to its host and back. Start at ``PieceCalls.send``.

Answers are read by the thread that waits for them, in whatever order they come. Whoever does not answer in time loses
its connection (``host_links.py``). Chooses no host.

Shape suffixes: T tokens of a call, D model width, E experts, K most experts that a token wants; t tokens of one piece.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import ConnectionLostError, FrameError
from dsmoe_ray.serving.config import WireConfig
from dsmoe_ray.serving.expert_cut import Cutter, CutTokens, Piece
from dsmoe_ray.serving.host_links import HostLink, HostLinks
from dsmoe_ray.serving.plan import PlacementPlan
from dsmoe_ray.serving.replica_choice import READING_WORK
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.expert_codec import call_to_frame, refusal_from_frame, result_from_frame
from dsmoe_ray.serving.wire.messages import ExpertCall, ExpertResult, Kind
from dsmoe_ray.serving.wire.plan_codec import plan_from_frame

logger = logging.getLogger(__name__)

_LEAST_WAIT_S = 0.01
"""An answer that is here already is read even if its deadline passed while this process did something else."""
_WAIT_UNIT_S = 0.05
"""Waits are multiples of it: a connection need not be told a new limit for every call."""
_WINDOW_BYTES = 192 << 10
"""Calls and answers that may be under way with one host, unless it is a single call. A host that computes, or that
waits until its answer is read, reads no further call; what is sent then must fit into the buffers between (Linux gives
a Unix socket 208 KiB), or both ends would wait for each other."""
_LOADING_PATIENCE = 4
"""How many times longer a host may take that has to read weights first."""
_WORK_PATIENCE = 4
"""How many times longer work may take than it took so far."""


class SentPiece(NamedTuple):
    """What an audit is told of every frame with tokens."""

    layer: int
    host_id: str
    plan_version: int
    token_rows: np.ndarray
    """Rows of the call's tokens."""
    expert_ids_TK: np.ndarray
    on_demand: bool
    """Sent to a host that need not hold these experts, because no living one does."""


Audit = Callable[[SentPiece], None]


@dataclass(slots=True)
class RemoteStatistics:
    """Totals since the start."""

    num_calls: int = 0
    num_frames: int = 0
    num_retries: int = 0
    """Times that a call went on after a piece of it had no result."""
    num_on_demand: int = 0
    """Frames to hosts that need not hold the experts."""
    wait_s: float = 0.0
    """Blocked on answers."""
    compute_s: float = 0.0
    """Of hosts, as they say."""
    queue_s: float = 0.0
    """At hosts before they began, as they say."""


@dataclass(slots=True, eq=False)
class PieceCall:
    """One frame and its answer."""

    number: int
    """Of the piece in its call."""
    layer: int
    dtype: Literal["float32", "bfloat16"]
    link: HostLink["PieceCall"]
    work: int
    patience_s: float
    deadline_s: float
    num_bytes: int
    answer_shape: tuple[int, int]
    y: np.ndarray | None = None
    failure: str | None = None
    refusal: str | None = None
    """The reason of a host that is there and does not compute it."""
    missing: tuple[int, ...] = ()
    """Experts for whose sake it does not, if not for all."""

    @property
    def is_waiting(self) -> bool:
        """Return whether there is neither an answer nor a failure."""
        return self.y is None and self.failure is None


@dataclass(slots=True, eq=False)
class LayerCall:
    """Tokens of one micro-batch for the experts of one layer."""

    layer: int
    tokens: CutTokens
    dtype: Literal["float32", "bfloat16"]
    piece_of_E: np.ndarray
    """See ``Cutter``. A piece that failed is replaced: its experts belong to later ones."""
    give_up_s: float
    pieces: dict[int, PieceCall] = field(default_factory=dict)
    """By number, those that count."""
    num_pieces: int = 0
    unplaced: list[int] = field(default_factory=list)
    """Experts that nobody was asked for yet."""
    failures: dict[int, dict[str, str]] = field(default_factory=dict)
    """By expert, hosts that had no result, and why."""
    refusing: dict[tuple[int, str], str] = field(default_factory=dict)
    """Pairs of expert and host that are not tried for now, and the reason that the host gave."""
    num_rounds: int = 0

    def list_wanted(self) -> list[int]:
        """Return the experts that some token wants."""
        return [expert_id for expert_id in np.unique(self.tokens.expert_ids_TK).tolist() if expert_id >= 0]


class PieceCalls:
    """Sends pieces and reads answers, for one thread."""

    def __init__(
        self,
        links: HostLinks[PieceCall],
        wire: WireConfig,
        *,
        cutter: Cutter,
        exact: bool,
        take_plan: Callable[[PlacementPlan], None],
        audit: Audit | None,
    ) -> None:
        self._links, self._wire, self._exact, self._cutter = links, wire, exact, cutter
        self._take_plan, self._audit = take_plan, audit
        self._num_call_ids = 0
        self._unread: dict[HostLink[PieceCall], PieceCall] = {}
        """Answers that lie in the memory of a connection, which the next ``receive`` uses again."""
        self.statistics = RemoteStatistics()

    def send(
        self, call: LayerCall, links: Sequence[HostLink[PieceCall]], *, plan_version: int, on_demand: bool = False
    ) -> None:
        """Send each of ``links`` the piece that ``call.piece_of_E`` gives it, in order, the next free number on."""
        numbers = range(call.num_pieces, call.num_pieces + len(links))
        call.num_pieces += len(links)
        pieces = self._cutter.cut(call.tokens, call.piece_of_E, numbers)
        for number, link, piece in zip(numbers, links, pieces, strict=True):
            if piece is not None:
                call.pieces[number] = self._send(
                    call, number, piece, link, plan_version=plan_version, on_demand=on_demand
                )

    def wait(self, sent: PieceCall, *, give_up_s: float) -> None:
        """Wait until a piece has an answer or failed."""
        start_s = monotonic_s()
        while sent.is_waiting:
            self._receive(sent, give_up_s)
        self.statistics.wait_s += monotonic_s() - start_s

    def release(self, sent: PieceCall) -> None:
        """Let go of an answer that was used."""
        if self._unread.get(sent.link) is sent:
            del self._unread[sent.link]

    def _send(
        self,
        call: LayerCall,
        number: int,
        piece: Piece,
        link: HostLink[PieceCall],
        *,
        plan_version: int,
        on_demand: bool,
    ) -> PieceCall:
        num_tokens, d_model = piece.x_tD.shape
        shape = (piece.num_pairs if self._exact else num_tokens, d_model)
        num_bytes = piece.x_tD.nbytes + 2 * piece.gates_tK.nbytes + 4 * shape[0] * d_model
        while link.pending and link.owed_bytes + num_bytes > _WINDOW_BYTES:
            self.wait(next(iter(link.pending.values())), give_up_s=call.give_up_s)
        now_s = monotonic_s()
        work = piece.num_pairs + READING_WORK * min(piece.num_pairs, len(call.piece_of_E) - 1)
        link.outstanding += work
        link.owed_bytes += num_bytes
        patience_s = self._compute_patience(link, call, on_demand=on_demand)
        sent = PieceCall(number, call.layer, call.dtype, link, work, patience_s, now_s + patience_s, num_bytes, shape)
        self._num_call_ids += 1
        link.pending[self._num_call_ids] = sent
        self.statistics.num_frames += 1
        self.statistics.num_on_demand += on_demand
        if self._audit is not None:
            rows, ids_tK = piece.rows.copy(), piece.expert_ids_tK.copy()
            self._audit(SentPiece(call.layer, link.info.host_id, plan_version, rows, ids_tK, on_demand=on_demand))
        message = ExpertCall(
            call_id=self._num_call_ids,
            layer=call.layer,
            plan_version=plan_version,
            exact=self._exact,
            deadline_ms=max(int(1000 * (call.give_up_s - now_s)), 0),
            dtype=call.dtype,
            x_TD=piece.x_tD,
            expert_ids_TK=piece.expert_ids_tK,
            gates_TK=piece.gates_tK,
            on_demand=on_demand,
        )
        connection = link.connection
        try:
            if connection is None:
                raise ConnectionLostError(link.reason)
            connection.send(call_to_frame(message))
        except ConnectionLostError as error:
            self._lose(link, str(error))
            sent.failure = str(error)
        return sent

    def _compute_patience(self, link: HostLink[PieceCall], call: LayerCall, *, on_demand: bool) -> float:
        """Return how long an answer may take: a fixed time, and some for what there is to do.

        Both grow with every round of a call: that hosts seemed lost may have been impatience.
        """
        loads = on_demand or call.layer not in link.layers_seen
        fixed_s = self._wire.expert_deadline_s * (_LOADING_PATIENCE if loads else 1)
        return (fixed_s + _WORK_PATIENCE * link.outstanding * link.seconds_per_work) * 2**call.num_rounds

    def _receive(self, sent: PieceCall, give_up_s: float) -> None:
        """Read one frame of the host that owes a piece, or find it lost."""
        link = sent.link
        now_s = monotonic_s()
        left_s = min(sent.deadline_s, give_up_s) - now_s
        wait_s = -(-left_s // _WAIT_UNIT_S) * _WAIT_UNIT_S if left_s > 0 else _LEAST_WAIT_S
        connection = link.connection
        try:
            if connection is None:
                raise ConnectionLostError(link.reason)
            self._keep_unread(link)
            frame = connection.receive(wait_s)
            if frame is not None:
                self._take(link, frame)
            elif monotonic_s() >= give_up_s or self._is_another_living(link):
                self._lose(link, f"it did not answer within {sent.patience_s:.2f} s", is_late=True)
            else:
                # Nobody else could be asked: what it has done so far would only be lost.
                sent.deadline_s = monotonic_s() + sent.patience_s
        except (ConnectionLostError, FrameError) as error:
            self._lose(link, str(error))
            # It may be an answer to this very piece that made no sense.
            sent.failure = sent.failure or str(error)

    def _is_another_living(self, link: HostLink[PieceCall]) -> bool:
        return any(other is not link for other in self._links.list_living())

    def _keep_unread(self, link: HostLink[PieceCall]) -> None:
        """Copy an answer that nobody has used before its memory is used again."""
        sent = self._unread.pop(link, None)
        if sent is not None and sent.y is not None:
            sent.y = sent.y.copy()

    def _take(self, link: HostLink[PieceCall], frame: Frame) -> None:
        """Take note of whatever a host says; what is no longer wanted is ignored."""
        if frame.kind == Kind.EXPERT_RESULT:
            result = result_from_frame(frame)
            sent = self._close(link, result.call_id)
            if sent is None:
                return
            self._check(sent, result)
            sent.y = result.y
            self._unread[link] = sent
            link.layers_seen.add(sent.layer)
            link.note_answer(sent.work, result.compute_us * 1e-6)
            self.statistics.compute_s += result.compute_us * 1e-6
            self.statistics.queue_s += result.queue_us * 1e-6
        elif frame.kind == Kind.EXPERT_REFUSAL:
            refusal = refusal_from_frame(frame)
            sent = self._close(link, refusal.call_id)
            if sent is not None:
                sent.failure, sent.refusal = f"{refusal.reason}: {refusal.message}", refusal.reason
                sent.missing = refusal.missing
        elif frame.kind == Kind.PLAN:
            self._take_plan(plan_from_frame(frame).plan)
        else:
            raise FrameError(f"a host sent a frame of kind {frame.kind}, which is not for routers")

    def _check(self, sent: PieceCall, result: ExpertResult) -> None:
        """Refuse a result that is not what was asked for."""
        y, dtype = result.y, np.float32 if self._exact or sent.dtype == "float32" else np.uint16
        if y.shape != sent.answer_shape or y.dtype != dtype:
            raise FrameError(
                f"the answer to call {result.call_id} must be {np.dtype(dtype)} of shape {sent.answer_shape}; found "
                f"{y.dtype} of {y.shape}"
            )

    def _close(self, link: HostLink[PieceCall], call_id: int) -> PieceCall | None:
        sent = link.pending.pop(call_id, None)
        if sent is not None:
            link.outstanding -= sent.work
            link.owed_bytes -= sent.num_bytes
            self._links.release(link)
        return sent

    def _lose(self, link: HostLink[PieceCall], reason: str, *, is_late: bool = False) -> None:
        self._keep_unread(link)
        for owed in self._links.lose(link, reason, is_late=is_late):
            owed.failure = reason
