"""One process that serves experts: it answers the calls of routers with what its experts say to their tokens.

Start at ``ExpertHost.handle``. A call whose experts are in memory is computed in the thread of its connection, see
``call_queue.py``. One that names others is refused if the plan gives them to other hosts, together with that plan; else
it waits on a thread of its own until they are read from disk, so that nobody else does. The controller is told what is
held and how much it is used, and says what to hold.

Shape suffixes: L layers, E experts, T tokens of a call, K experts that a token names, R rows of an answer.
"""

import dataclasses
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import ConnectionLostError, FrameError
from dsmoe_ray.serving.call_queue import CallQueue, QueuedCall, QueueFullError
from dsmoe_ray.serving.control import HostOrders, HostReport
from dsmoe_ray.serving.expert_compute import MAX_TOKENS, ExpertCompute, compute_key, count_rows, to_wire
from dsmoe_ray.serving.expert_cut import CutTokens, NumpyCutter
from dsmoe_ray.serving.expert_loader import ExpertLoader
from dsmoe_ray.serving.expert_pool import ExpertPool
from dsmoe_ray.serving.plan import HostInfo, LogicalExpert, PlacementPlan
from dsmoe_ray.serving.wire.connection import Connection, Frame, Listener
from dsmoe_ray.serving.wire.expert_codec import (
    ModelSizes,
    call_from_frame,
    find_call_id,
    refusal_to_frame,
    result_to_frame,
)
from dsmoe_ray.serving.wire.messages import ExpertCall, ExpertRefusal, ExpertResult, Kind, PlanMessage
from dsmoe_ray.serving.wire.plan_codec import plan_to_frame

MAX_WAITING = 64
"""Calls that wait for their turn, and calls that wait for the disk; more are refused."""
LINGER_S = 5.0
"""How long an expert that nobody ordered stays after its last use."""
_MAX_READERS = 4
"""Calls whose experts are read at the same time."""

_logger = logging.getLogger(__name__)


class HostCounts(NamedTuple):
    """What a host has done since it began."""

    num_calls: int
    num_late: int
    """Calls whose deadline passed before they were computed."""
    num_cold: int
    """Calls that waited for the disk."""
    num_refused: int
    num_waiting: int
    """Calls that wait now, for their turn or for the disk."""


@dataclasses.dataclass(eq=False, kw_only=True, slots=True)
class _TakenCall(QueuedCall):
    """A call, and what became of it when its turn had come."""

    call: ExpertCall
    num_tokens_E: np.ndarray
    """Of the call, for each expert."""
    wanted_E: np.ndarray
    """bool."""
    arrived_s: float
    deadline_s: float
    began_s: float = 0.0
    ended_s: float = 0.0
    missing: np.ndarray | None = None
    """Ids of experts that were not in memory."""
    y_RD: np.ndarray | None = None
    """The answer in float32; None where something was missing, or it came too late."""


class _Link:
    """A router's connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.pushed_version = 0
        """Of the newest plan that was sent."""
        self.has_erred = False


class ExpertHost:
    """Serves the experts of a pool to routers."""

    def __init__(
        self,
        pool: ExpertPool,
        info: HostInfo,
        *,
        num_threads: int = 1,
        max_waiting: int = MAX_WAITING,
        linger_s: float = LINGER_S,
        now_s: Callable[[], float] = monotonic_s,
    ) -> None:
        """Hold nothing yet.

        Args:
            pool: The experts; nobody else may use it from now on.
            info: Who this is; ``serve`` adds addresses.
            num_threads: Of one computation.
            max_waiting: See ``MAX_WAITING``.
            linger_s: See ``LINGER_S``.
            now_s: The clock of deadlines.
        """
        self._pool, self._info, self._num_threads = pool, info, num_threads
        self._max_waiting, self._linger_s, self._now_s = max_waiting, linger_s, now_s
        self._sizes = ModelSizes(num_layers=pool.num_layers, num_experts=pool.num_experts, d_model=pool.config.d_model)
        self._compute = ExpertCompute(pool.memory, num_threads=num_threads)
        self._queue = CallQueue(self._run_batch, max_size=MAX_TOKENS, max_waiting=max_waiting)
        self._loader = ExpertLoader(pool, name=info.host_id, now_s=now_s)
        num_readers = min(_MAX_READERS, pool.capacity)
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix=f"cold calls {info.host_id}")
        # So many at a time for each reader that none ever waits for what another one keeps.
        has_room_for_all = pool.capacity == pool.num_layers * pool.num_experts
        self._group_size = pool.num_experts if has_room_for_all else pool.capacity // num_readers
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()
        """Of listeners and of what is counted in several threads."""
        self._plan: PlacementPlan | None = None
        self._planned: frozenset[LogicalExpert] = frozenset()
        """What it gives to this host."""
        self._own_LE = np.zeros((pool.num_layers, pool.num_experts), bool)
        """What the plan or the last orders give to this host."""
        self._send_plan = self._is_leaving = self._is_closed = False
        self._may_leave = threading.Event()
        self._num_tokens_LE = np.zeros((pool.num_layers, pool.num_experts), np.int64)
        self._busy_s = 0.0
        self._num_calls = self._num_late = self._num_cold = self._num_refused = self._num_reading = 0

    def serve(self, listener: Listener) -> None:
        """Take over a listener whose connections go to ``handle``: it is closed with this host."""
        with self._lock:
            self._listeners.append(listener)
            addresses = tuple(one.address for one in self._listeners)
        self._info = dataclasses.replace(self._info, addresses=addresses)

    def handle(self, connection: Connection) -> None:
        """Serve one router until its connection is lost.

        Raises:
            ConnectionLostError: it is lost.
            FrameError: it sent what is no call.
        """
        link = _Link(connection)
        while not self._is_closed:
            frame = connection.receive()
            if frame is not None:
                self._take_frame(link, frame)

    def report(self) -> HostReport:
        """Return what the controller is told."""
        pool, plan = self._pool, self._plan
        num_tokens_LE = self._num_tokens_LE.copy()
        layers, expert_ids = np.nonzero(num_tokens_LE)
        experts = [LogicalExpert(*pair) for pair in zip(layers.tolist(), expert_ids.tolist(), strict=True)]
        return HostReport(
            info=self._info,
            plan_version=0 if plan is None else plan.version,
            held=frozenset(pool.held),
            failures=self._loader.failures,
            num_tokens=dict(zip(experts, num_tokens_LE[layers, expert_ids].tolist(), strict=True)),
            busy_s=self._busy_s,
            num_threads=self._num_threads,
            leaving=self._is_leaving,
            plan=plan if self._send_plan else None,
        )

    def apply(self, orders: HostOrders) -> None:
        """Do what the controller says; reading goes on after this returns."""
        self._send_plan = orders.send_plan
        if orders.plan is not None and (self._plan is None or orders.plan.version > self._plan.version):
            self._plan, self._planned = orders.plan, orders.plan.held_by(self._info.host_id)
        own_LE = np.zeros_like(self._own_LE)
        for expert in (*self._planned, *orders.hold, *orders.may_hold):
            own_LE[expert] = True
        self._own_LE = own_LE
        self._loader.load(self._pool.order(orders.hold))
        self._pool.drop_idle(self._linger_s)
        if orders.may_leave:
            self._may_leave.set()

    def wait_until_loaded(self, timeout_s: float) -> bool:
        """Return True as soon as all that was ordered is here or has failed, False if that takes too long."""
        return self._loader.wait(timeout_s)

    def leave(self) -> None:
        """Ask the controller to need this host no more; calls are answered until it is closed."""
        self._is_leaving = True

    def wait_until_unneeded(self, timeout_s: float) -> bool:
        """Return True as soon as the controller lets this host go, False if that takes too long."""
        return self._may_leave.wait(timeout_s)

    def close(self) -> None:
        """Stop after the calls under way; routers see their connections end."""
        with self._lock:
            self._is_closed = True
            listeners = list(self._listeners)
        for listener in listeners:
            listener.close()
        self._loader.close()
        self._readers.shutdown(cancel_futures=True)

    @property
    def counts(self) -> HostCounts:
        """Return what was done so far."""
        with self._lock:
            num_waiting = self._queue.num_waiting + self._num_reading
            return HostCounts(self._num_calls, self._num_late, self._num_cold, self._num_refused, num_waiting)

    # In the thread of a connection.

    def _take_frame(self, link: _Link, frame: Frame) -> None:
        arrived_s = self._now_s()
        try:
            if frame.kind != Kind.EXPERT_CALL:
                raise FrameError(f"a host takes expert calls; found a frame of kind {frame.kind}")
            call = call_from_frame(frame, self._sizes)
        except FrameError as error:
            self._refuse_frame(link, frame, error)
            return
        self._push_plan(link, call.plan_version)
        taken = self._take(call, arrived_s)
        self._settle(link, taken, self._queue.run)
        if taken.missing is not None:
            self._take_cold(link, taken, taken.missing)

    def _take(self, call: ExpertCall, arrived_s: float) -> _TakenCall:
        num_tokens_E = np.bincount((call.expert_ids_TK + 1).ravel(), minlength=self._pool.num_experts + 1)[1:]
        return _TakenCall(
            key=compute_key(call),
            size=len(call.x_TD),
            call=call,
            num_tokens_E=num_tokens_E,
            wanted_E=num_tokens_E > 0,
            arrived_s=arrived_s,
            deadline_s=arrived_s + call.deadline_ms / 1000,
        )

    def _take_cold(self, link: _Link, taken: _TakenCall, missing: np.ndarray) -> None:
        """Refuse a call some of whose experts are not here, or let it wait until they are."""
        call, plan = taken.call, self._plan
        is_ours = plan is None or call.on_demand or call.plan_version > plan.version
        if not is_ours and not self._own_LE[call.layer][missing].all():
            named = ", ".join(map(str, missing[:8].tolist()))
            message = f"experts {named} of layer {call.layer} are at other hosts"
            self._refuse(link, call.call_id, "not_held", message, missing=tuple(missing.tolist()))
            return
        # What was received is overwritten by the next frame.
        arrays = {name: getattr(call, name).copy() for name in ("x_TD", "expert_ids_TK", "gates_TK")}
        cold = self._take(dataclasses.replace(call, **arrays), taken.arrived_s)
        with self._lock:
            if self._is_closed:
                return
            is_full = self._num_reading >= self._max_waiting
            if not is_full:
                self._num_reading += 1
                self._num_cold += 1
                self._readers.submit(self._run_cold, link, cold)
        if is_full:
            message = f"{self._max_waiting} calls wait for the disk already, as many as are allowed"
            self._refuse(link, call.call_id, "overloaded", message)

    def _push_plan(self, link: _Link, known_version: int) -> None:
        plan = self._plan
        if plan is not None and max(known_version, link.pushed_version) < plan.version:
            link.pushed_version = plan.version
            link.connection.send(plan_to_frame(PlanMessage(plan=plan)))

    def _refuse_frame(self, link: _Link, frame: Frame, error: FrameError) -> None:
        """Refuse the call that a frame should have been, or give the connection up if it does not even say which."""
        call_id = find_call_id(frame)
        if call_id is None:
            raise error
        if not link.has_erred:
            link.has_erred = True
            _logger.warning("%s sent a call that cannot be computed: %s", dict(link.connection.peer), error)
        self._refuse(link, call_id, "failed", str(error))

    # In a thread of the readers.

    def _run_cold(self, link: _Link, taken: _TakenCall) -> None:
        try:
            self._settle(link, taken, self._read_and_run)
        except ConnectionLostError as error:
            _logger.info("nobody waits for a call any more: %s", error)
        finally:
            with self._lock:
                self._num_reading -= 1

    def _read_and_run(self, taken: _TakenCall) -> None:
        """Read what a call lacks and compute it; in parts if its experts may not be here all at once."""
        if taken.deadline_s <= self._now_s():
            self._count_late()
            return
        wanted = np.flatnonzero(taken.wanted_E)
        groups = [wanted[start : start + self._group_size] for start in range(0, len(wanted), self._group_size)]
        if len(groups) > 1:
            self._read_and_run_parts(taken, groups)
            return
        with self._pool.pinned(taken.call.layer, wanted):
            self._queue.run(taken)

    def _read_and_run_parts(self, taken: _TakenCall, groups: list[np.ndarray]) -> None:
        call = taken.call
        piece_of_E = np.full(self._pool.num_experts + 1, -1, np.int32)
        for piece, group in enumerate(groups):
            piece_of_E[group] = piece
        piece_of_P = piece_of_E[call.expert_ids_TK[call.expert_ids_TK >= 0]]
        y_RD = np.zeros((count_rows(call), self._sizes.d_model), np.float32)
        busy_s = 0.0
        tokens = CutTokens(call.x_TD, call.expert_ids_TK, call.gates_TK)
        for piece, cut in enumerate(NumpyCutter().cut(tokens, piece_of_E, range(len(groups)))):
            assert cut is not None
            part = self._take(
                dataclasses.replace(call, x_TD=cut.x_tD, expert_ids_TK=cut.expert_ids_tK, gates_TK=cut.gates_tK),
                taken.arrived_s,
            )
            with self._pool.pinned(call.layer, groups[piece]):
                self._queue.run(part)
            if part.y_RD is None:
                return
            if call.exact:
                y_RD[piece_of_P == piece] = part.y_RD
            else:
                y_RD[cut.rows] += part.y_RD
            busy_s += part.ended_s - part.began_s
            taken.began_s, taken.ended_s = part.ended_s - busy_s, part.ended_s
        taken.y_RD = y_RD

    # In any thread.

    def _settle(self, link: _Link, taken: _TakenCall, run: Callable[[_TakenCall], None]) -> None:
        """Compute a call, and answer it if there is an answer."""
        call = taken.call
        try:
            run(taken)
        except QueueFullError as error:
            self._refuse(link, call.call_id, "overloaded", str(error))
            return
        except Exception as error:
            _logger.exception("a call for layer %d failed", call.layer)
            self._refuse(link, call.call_id, "failed", f"{type(error).__name__}: {error}")
            return
        if taken.y_RD is None:
            return
        result = ExpertResult(
            call_id=call.call_id,
            compute_us=int(1e6 * (taken.ended_s - taken.began_s)),
            queue_us=int(1e6 * (taken.began_s - taken.arrived_s)),
            y=taken.y_RD if call.exact else to_wire(taken.y_RD, call.dtype),
        )
        link.connection.send(result_to_frame(result))

    def _run_batch(self, batch: list[_TakenCall]) -> None:
        """Compute those calls of a batch of which everything is here; the queue lets one batch in at a time."""
        began_s = self._now_s()
        ready: list[_TakenCall] = []
        try:
            for taken in batch:
                if taken.deadline_s <= began_s:
                    self._count_late()
                    continue
                taken.missing = self._pool.pin(taken.call.layer, taken.wanted_E)
                if taken.missing is None:
                    ready.append(taken)
            answers = self._compute.compute([taken.call for taken in ready]) if ready else []
        finally:
            for taken in ready:
                self._pool.unpin(taken.call.layer, taken.wanted_E)
        ended_s = self._now_s()
        self._busy_s += ended_s - began_s
        self._num_calls += len(ready)
        for taken, y_RD in zip(ready, answers, strict=True):
            self._num_tokens_LE[taken.call.layer] += taken.num_tokens_E
            taken.y_RD, taken.began_s, taken.ended_s = y_RD, began_s, ended_s

    def _count_late(self) -> None:
        with self._lock:
            self._num_late += 1

    def _refuse(
        self,
        link: _Link,
        call_id: int,
        reason: Literal["not_held", "overloaded", "failed"],
        message: str,
        *,
        missing: tuple[int, ...] = (),
    ) -> None:
        with self._lock:
            self._num_refused += 1
        refusal = ExpertRefusal(call_id=call_id, reason=reason, message=message, missing=missing)
        link.connection.send(refusal_to_frame(refusal))
