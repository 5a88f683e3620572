"""The serving loop around an engine: requests of gateways in, one frame per gateway and step out.

Start at ``RouterService.turn``, which the engine's thread repeats: take what came, let go whose time is over, compute a
step, tell the gateways. Threads of the connections only read frames and put calls into the loop's inbox; threads of
``GatewayLink`` only write. So the engine has one thread, which waits for nobody while there is work; when there is none
it sleeps until something comes.

A step that fails counts for nothing and is tried again; see ``step_retry.py`` for what becomes of the requests.
"""

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import EngineFullError, RequestError
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.serving.control import RouterInfo, RouterOrders, RouterReport, Suspicion
from dsmoe_ray.serving.gateway_link import GatewayLink, Told
from dsmoe_ray.serving.plan import PlacementPlan
from dsmoe_ray.serving.step_retry import StepRetry, is_nobodys_fault
from dsmoe_ray.serving.taken_requests import TakenRequest, TakenRequests
from dsmoe_ray.serving.wire.connection import Connection, Frame, Listener
from dsmoe_ray.serving.wire.generation_codec import from_frame, request_id_of
from dsmoe_ray.serving.wire.messages import (
    CancelMessage,
    GenerateMessage,
    RejectedMessage,
    RejectReason,
    RouterStatusMessage,
)

_MAX_PROMPT_SCORES = 1 << 22
_FLUSH_S = 1.0
"""How long a gateway may take to read the last outputs of a router that closes."""

_logger = logging.getLogger(__name__)


class ExpertHosts(Protocol):
    """The remote experts of an engine, as far as the control plane is concerned."""

    @property
    def plan(self) -> PlacementPlan:
        """Return the newest plan that is known here."""

    @property
    def suspected_hosts(self) -> Mapping[str, Suspicion]:
        """Return the hosts that seem to be dead or hung, by id."""

    def update_plan(self, plan: PlacementPlan) -> None:
        """Use a plan if it is newer; from any thread."""


@dataclass(frozen=True, kw_only=True)
class RouterLimits:
    """When a router gives something up."""

    max_buffered_outputs: int = 1 << 16
    """Outputs that a gateway may leave unread."""
    max_request_s: float = 600.0
    """Deadline of requests that have none."""


class RouterService:
    """An engine that works for gateways."""

    def __init__(
        self,
        engine: Engine,
        info: RouterInfo,
        *,
        experts: ExpertHosts | None = None,
        limits: RouterLimits | None = None,
        now_s: Callable[[], float] = monotonic_s,
    ) -> None:
        """Take over an engine; nobody else may use it from now on.

        Args:
            engine: Built by the caller.
            info: Who this is; ``serve`` adds addresses.
            experts: The engine's remote experts if it has some.
            limits: See there.
            now_s: The clock of deadlines.
        """
        self._engine, self._info, self._experts = engine, info, experts
        self._limits, self._now_s = limits or RouterLimits(), now_s
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gateways: set[GatewayLink] = set()
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()
        """Of gateways and listeners."""
        self._requests = TakenRequests()
        self._retry: StepRetry[TakenRequest] = StepRetry(self._requests.__contains__)
        self._retry_s = 0.0
        """When a step that failed is tried again."""
        self._is_leaving = self._is_closed = False
        self._is_idle = threading.Event()
        self._is_idle.set()
        self._step_began_s: float | None = None
        self._send_plan = False
        self._num_cache_tokens = engine.status.num_blocks * engine.config.block_size
        self._status = self._read_status()
        self._thread = threading.Thread(target=self._run, name=f"router {info.router_id}", daemon=True)

    # From any thread.

    def start(self) -> None:
        """Begin to compute on a thread of its own."""
        self._thread.start()

    def serve(self, listener: Listener) -> None:
        """Take over a listener whose connections go to ``handle``: it is closed with this router."""
        with self._lock:
            self._listeners.append(listener)
            addresses = tuple(one.address for one in self._listeners)
        self._info = dataclasses.replace(self._info, addresses=addresses)

    def handle(self, connection: Connection) -> None:
        """Serve one gateway until its connection is lost.

        Raises:
            ConnectionLostError: it is lost.
            FrameError: it sent what cannot be used.
        """
        link = GatewayLink(connection, self.read_status, max_buffered_outputs=self._limits.max_buffered_outputs)
        with self._lock:
            self._gateways.add(link)
        try:
            # A router that was closed meanwhile has not seen this one.
            while not self._is_closed:
                frame = connection.receive()
                if frame is not None:
                    self._take_frame(link, frame)
        finally:
            with self._lock:
                self._gateways.discard(link)
            link.close()
            self._inbox.put(partial(self._forget_gateway, link))

    def read_status(self) -> RouterStatusMessage:
        """Return how busy this router is."""
        began_s = self._step_began_s
        age_ms = 0 if began_s is None else int(1000 * (self._now_s() - began_s))
        return dataclasses.replace(self._status, leaving=self._is_leaving, step_age_ms=max(0, age_ms))

    def report(self) -> RouterReport:
        """Return what the controller is told."""
        status, plan = self._status, None if self._experts is None else self._experts.plan
        suspected = {} if self._experts is None else self._experts.suspected_hosts
        max_num_seqs = self._engine.config.max_num_seqs
        taken = status.num_running + status.num_waiting
        return RouterReport(
            info=dataclasses.replace(self._info, leaving=self._is_leaving),
            plan_version=0 if plan is None else plan.version,
            suspected=suspected,
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            load=max(taken / max_num_seqs, 1 - status.num_free_tokens / self._num_cache_tokens),
            plan=plan if self._send_plan else None,
        )

    def apply(self, orders: RouterOrders) -> None:
        """Do what the controller says."""
        self._send_plan = orders.send_plan
        if self._experts is not None and orders.plan is not None:
            self._experts.update_plan(orders.plan)

    def leave(self) -> None:
        """Take no new requests, and tell all gateways to take theirs elsewhere."""
        self._is_leaving = True
        with self._lock:
            gateways = list(self._gateways)
        for link in gateways:
            link.send_status()

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Return True as soon as no request is here, False if that takes too long."""
        return self._is_idle.wait(timeout_s)

    def close(self) -> None:
        """Stop at once, after the step under way; gateways see their connections end."""
        self._is_closed = True
        self._inbox.put(lambda: None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        with self._lock:
            listeners, gateways = list(self._listeners), list(self._gateways)
        for link in gateways:
            link.finish(_FLUSH_S)
        for listener in listeners:
            listener.close()

    @property
    def is_running(self) -> bool:
        """Return whether its thread lives."""
        return self._thread.is_alive()

    def _take_frame(self, link: GatewayLink, frame: Frame) -> None:
        try:
            message = from_frame(frame)
        except RequestError as error:
            link.reject(_refuse(request_id_of(frame), "invalid", error))
            return
        if isinstance(message, GenerateMessage):
            self._inbox.put(partial(self._add, link, message, self._now_s()))
        elif isinstance(message, CancelMessage):
            self._inbox.put(partial(self._cancel, link, message))
        else:
            _logger.warning("%s sent %s, which is for gateways", link.name, type(message).__name__)

    # The engine's thread.

    def _run(self) -> None:
        try:
            while not self._is_closed:
                self.turn()
        except Exception:
            # Gateways go elsewhere when they see their connections end, and ``is_running`` tells everyone else.
            _logger.exception("router %s stops", self._info.router_id)
            self.close()

    def turn(self) -> None:
        """Take what came, waiting for it if there is nothing else to do; compute one step if there is work."""
        self._take_inbox()
        self._expire()
        if self._engine.has_work and self._now_s() >= self._retry_s:
            self._step()
        self._status = self._read_status()
        if not self._requests and self._inbox.empty():
            self._is_idle.set()

    def _take_inbox(self) -> None:
        inbox = self._inbox
        if not self._engine.has_work:
            inbox.get()()
        elif (pause_s := self._find_pause_s()) > 0:
            try:
                inbox.get(timeout=pause_s)()
            except queue.Empty:
                return
        while not inbox.empty():
            inbox.get()()

    def _find_pause_s(self) -> float:
        """Return how long a failed step's next try is away, at most until the next deadline."""
        if not self._retry.num_failures:
            return 0.0
        deadline_s = self._requests.next_deadline_s
        return (self._retry_s if deadline_s is None else min(self._retry_s, deadline_s)) - self._now_s()

    def _add(self, link: GatewayLink, message: GenerateMessage, arrived_s: float) -> None:
        if self._is_leaving:
            link.reject(RejectedMessage(request_id=message.request_id, reason="leaving", message="the router stops"))
            return
        taken = self._make_taken(link, message, arrived_s)
        try:
            if self._requests.find(link, taken.wire_id) is not None:
                raise RequestError(f"a request {taken.wire_id!r} is running already. Take another id.", param="id")
            _check_scores(message.request)
            self._engine.add(taken, message.request)
        except RequestError as error:
            link.reject(_refuse(taken.wire_id, "invalid", error))
            return
        except EngineFullError as error:
            link.reject(_refuse(taken.wire_id, "full", error))
            return
        except Exception as error:
            _logger.exception("%r cannot be taken on", taken)
            link.reject(_refuse(taken.wire_id, "failed", f"{type(error).__name__}: {error}"))
            return
        self._is_idle.clear()
        self._requests.add(taken)
        self._retry.note_added(taken)

    def _make_taken(self, link: GatewayLink, message: GenerateMessage, arrived_s: float) -> TakenRequest:
        request = message.request
        most_s = self._limits.max_request_s if message.deadline_ms is None else message.deadline_ms / 1000
        num_known = len(request.prompt_ids) + len(request.generated_ids)
        max_len = request.compute_max_len(self._engine.model_config)
        return TakenRequest(
            link,
            message.request_id,
            deadline_s=arrived_s + most_s,
            num_unfinished=request.n,
            num_outstanding_tokens=num_known + request.n * max(0, max_len - num_known),
        )

    def _cancel(self, link: GatewayLink, message: CancelMessage) -> None:
        for wire_id in message.request_ids:
            taken = self._requests.find(link, wire_id)
            # It may have ended while the message was under way.
            if taken is not None:
                self._let_go(taken)

    def _forget_gateway(self, link: GatewayLink) -> None:
        for taken in self._requests.list_of(link):
            self._let_go(taken)

    def _let_go(self, taken: TakenRequest) -> None:
        self._engine.cancel(taken)
        self._requests.remove(taken)

    def _fail(self, taken: TakenRequest, reason: RejectReason, error: Exception | str) -> None:
        _logger.warning("%r fails: %s", taken, error)
        self._let_go(taken)
        taken.gateway.reject(_refuse(taken.wire_id, reason, error))

    def _expire(self) -> None:
        """Let requests go whose time is over."""
        for taken in self._requests.pop_expired(self._now_s()):
            because = f": {self._retry.last_error}" if self._retry.last_error is not None else ""
            self._fail(taken, "expired", f"the request did not end within its deadline{because}")

    def _step(self) -> None:
        self._step_began_s = self._now_s()
        try:
            outputs = self._engine.step()
        except Exception as error:  # noqa: BLE001 - tried again, and in the end told to those who asked
            self._note_failure(error)
            return
        finally:
            self._step_began_s = None
        self._retry.reset()
        self._tell(outputs)

    def _tell(self, outputs: list[SequenceOutput]) -> None:
        told_of: dict[GatewayLink, list[Told]] = {}
        for output in outputs:
            taken = output.request_id
            assert isinstance(taken, TakenRequest)
            self._requests.note_token(taken)
            told_of.setdefault(taken.gateway, []).append((taken.wire_id, output))
            if output.finish_reason is not None:
                taken.num_unfinished -= 1
                if not taken.num_unfinished:
                    self._requests.remove(taken)
        for link, told in told_of.items():
            link.push_outputs(told)

    def _note_failure(self, error: Exception) -> None:
        decision = self._retry.decide(error)
        if self._retry.num_failures == 1:
            expected = is_nobodys_fault(error)
            _logger.warning("a step failed and is tried again: %s", error, exc_info=not expected)
        if decision.gives_up:
            for taken in self._requests if decision.suspect is None else (decision.suspect,):
                self._fail(taken, "failed", f"{type(error).__name__}: {error}")
        if not self._requests:
            self._retry.reset()
        self._retry_s = self._now_s() + decision.pause_s

    def _read_status(self) -> RouterStatusMessage:
        status = self._engine.status
        return RouterStatusMessage(
            num_running=status.num_running,
            num_waiting=status.num_waiting,
            num_free_tokens=status.num_free_blocks * self._engine.config.block_size,
            num_outstanding_tokens=self._requests.num_outstanding_tokens,
            leaving=self._is_leaving,
        )


def _check_scores(request: GenerationRequest) -> None:
    """Refuse what would be told in a frame that no connection carries."""
    if request.prompt_logprobs is None:
        return
    num_scores = len(request.prompt_ids) * (1 + request.prompt_logprobs)
    if num_scores > _MAX_PROMPT_SCORES:
        raise RequestError(
            f"{num_scores} log probabilities are asked for of a prompt of {len(request.prompt_ids)} tokens; at most "
            f"{_MAX_PROMPT_SCORES} can be told. Shorten the prompt or lower prompt_logprobs.",
            param="prompt_logprobs",
        )


def _refuse(request_id: str, reason: RejectReason, error: Exception | str) -> RejectedMessage:
    param = error.param if isinstance(error, RequestError) else None
    return RejectedMessage(request_id=request_id, reason=reason, message=str(error), param=param)
