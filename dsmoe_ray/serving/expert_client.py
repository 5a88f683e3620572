"""FFN experts in other processes: the ``ExpertBackend`` of a router. Start at ``RemoteExperts.dispatch``.

A call is one layer of one micro-batch. It is cut into a piece for each host that some of its tokens need, and all
pieces are sent at once; ``combine`` reads the answers on the caller's own thread and adds them up. A piece whose host
is lost, hung or refuses is cut anew among the replicas that are left, and if there are none, sent to a living host that
loads the experts; all within the deadline of a request. Experts are pure functions, so none of this changes a result.

Shape suffixes: T tokens of a call, D model width, E experts, K most experts that a token wants.
"""

import threading
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import ConfigError, ExpertUnavailableError
from dsmoe_ray.model.dispatch import ExpertAssignment
from dsmoe_ray.serving.compiled_cut import build_cutter
from dsmoe_ray.serving.config import WireConfig
from dsmoe_ray.serving.expert_cut import CutTokens
from dsmoe_ray.serving.host_links import Connect, HostLink, HostLinks, LinkState, Suspicion
from dsmoe_ray.serving.piece_calls import Audit, LayerCall, PieceCall, PieceCalls, RemoteStatistics
from dsmoe_ray.serving.plan import LogicalExpert, PlacementPlan
from dsmoe_ray.serving.replica_choice import choose_refuge, choose_replicas

_BACKOFF_S = 0.05
"""Pause before hosts that refused are asked again."""
_MAX_INPUTS = 4
_FRAME_SLACK_BYTES = 1 << 16
"""Of a frame, for what is not outputs."""


class _Handle(NamedTuple):
    """One dispatch: more than one call if one answer might be too long for a frame."""

    calls: list[LayerCall]
    device: torch.device


class _Inputs(NamedTuple):
    """The tensors of a dispatch, and the arrays that share their memory."""

    x_TD: torch.Tensor
    assignment: ExpertAssignment
    dtype: Literal["float32", "bfloat16"]
    parts: list[CutTokens]


class _Settled(NamedTuple):
    """Where the tokens of a layer go as long as nothing changes: each expert has one living holder."""

    piece_of_E: np.ndarray
    links: list[HostLink[PieceCall]]


class _PlanTable:
    """A plan, by layer, and what follows from it while the same hosts are living."""

    def __init__(self, plan: PlacementPlan) -> None:
        self.plan = plan
        self._holders: dict[int, dict[int, tuple[str, ...]]] = {}
        for expert, host_ids in plan.replicas.items():
            self._holders.setdefault(expert.layer, {})[expert.expert_id] = tuple(host_ids)
        self.settled: dict[int, _Settled | None] = {}
        self.settled_version = -1
        """Of the links that ``settled`` is right for."""

    def holders_of(self, layer: int) -> Mapping[int, tuple[str, ...]]:
        return self._holders.get(layer, {})


class RemoteExperts:
    """The FFN experts of all layers, on the hosts of a plan."""

    def __init__(
        self,
        plan: PlacementPlan,
        *,
        num_experts: int,
        exact: bool,
        connect: Connect,
        node_id: str,
        wire: WireConfig | None = None,
        audit: Audit | None = None,
    ) -> None:
        """Begin to connect.

        Args:
            plan: The first one; newer ones come from hosts or through ``update_plan``.
            num_experts: Of a layer.
            exact: Whether sums are made here, in the order of expert ids; see ``ExpertBackend``.
            connect: Opens a connection to a host.
            node_id: Of this process; hosts with the same one are preferred.
            wire: Deadlines and limits.
            audit: Is told of every frame with tokens before it is sent.
        """
        self._num_experts, self._exact = num_experts, exact
        self._wire = wire or WireConfig()
        self._links: HostLinks[PieceCall] = HostLinks(connect, node_id=node_id)
        self._cutter = build_cutter(num_threads=torch.get_num_threads())
        self._calls = PieceCalls(
            self._links, self._wire, cutter=self._cutter, exact=exact, take_plan=self.update_plan, audit=audit
        )
        self._inputs: dict[int, _Inputs] = {}
        """By the id of their first tensor, those whose memory is the tensors' own."""
        self._plan_lock = threading.Lock()
        self._table = _PlanTable(plan)
        self._links.set_hosts(plan.hosts.values())

    @property
    def plan(self) -> PlacementPlan:
        """Return the newest plan that is known here."""
        return self._table.plan

    @property
    def statistics(self) -> RemoteStatistics:
        """Return totals since the start."""
        return self._calls.statistics

    @property
    def suspected_hosts(self) -> dict[str, Suspicion]:
        """Return the hosts of the plan that seem to be dead or hung, by id."""
        return self._links.list_suspected()

    @property
    def outstanding_work(self) -> dict[str, int]:
        """Return the work, see ``replica_choice.py``, that each living host owes."""
        return {link.info.host_id: link.outstanding for link in self._links.list_living()}

    def update_plan(self, plan: PlacementPlan) -> None:
        """Use a plan from the next call on if it is newer; from any thread."""
        with self._plan_lock:
            if plan.version <= self._table.plan.version:
                return
            self._table = _PlanTable(plan)
            self._links.set_hosts(plan.hosts.values())

    def wait_until_connected(self, timeout_s: float) -> bool:
        """Wait until every host of the plan was reached or found missing; return whether all were reached."""
        return self._links.wait_until_tried(timeout_s) and not self.suspected_hosts

    def close(self) -> None:
        """Close all connections."""
        self._links.close()

    def dispatch(self, layer: int, x_TD: torch.Tensor, assignment: ExpertAssignment) -> _Handle:
        """Send tokens to hosts; see ``ExpertBackend``."""
        self.statistics.num_calls += 1
        give_up_s = monotonic_s() + self._wire.request_deadline_s
        inputs = self._read(x_TD, assignment)
        calls = []
        for tokens in inputs.parts:
            table = self._table
            settled = self._find_settled(table, layer)
            piece_of_E = self._nobody() if settled is None else settled.piece_of_E
            call = LayerCall(layer, tokens, inputs.dtype, piece_of_E, give_up_s)
            calls.append(call)
            if settled is None:
                self._place(call, call.list_wanted())
            else:
                self._calls.send(call, settled.links, plan_version=table.plan.version)
        return _Handle(calls, x_TD.device)

    def combine(self, handle: _Handle) -> torch.Tensor:
        """Wait for the outputs and add them; float32, see ``ExpertBackend``.

        Raises:
            ExpertUnavailableError: an expert is nowhere to be had within the deadline of a request.
        """
        parts = [self._combine(call) for call in handle.calls]
        y_TD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y_TD if handle.device.type == "cpu" else y_TD.to(handle.device)

    def _read(self, x_TD: torch.Tensor, assignment: ExpertAssignment) -> _Inputs:
        """Return the tokens of a call as arrays; a runner may give the same tensors, filled anew, for every layer."""
        known = self._inputs.get(id(x_TD))
        if known is not None and known.x_TD is x_TD and known.assignment is assignment:
            return known
        dtype, wire_TD = self._to_wire(x_TD)
        ids_TK, gates_TK = assignment.expert_ids_TK.cpu().numpy(), assignment.gates_TK.cpu().numpy()
        max_pairs = max((self._wire.max_frame_bytes - _FRAME_SLACK_BYTES) // (4 * x_TD.shape[1]), ids_TK.shape[1], 1)
        slices = [slice(0, len(ids_TK))] if ids_TK.size <= max_pairs else _split(ids_TK, max_pairs)
        inputs = _Inputs(
            x_TD, assignment, dtype, [CutTokens(wire_TD[rows], ids_TK[rows], gates_TK[rows]) for rows in slices]
        )
        is_view = x_TD.device.type == "cpu" and wire_TD.ctypes.data == x_TD.data_ptr()
        if is_view and ids_TK.size <= max_pairs:
            if len(self._inputs) == _MAX_INPUTS:
                self._inputs.clear()
            self._inputs[id(x_TD)] = inputs
        return inputs

    def _to_wire(self, x_TD: torch.Tensor) -> tuple[Literal["float32", "bfloat16"], np.ndarray]:
        x_TD = x_TD.detach()
        if self._wire.dtype != "auto":
            wanted = getattr(torch, self._wire.dtype)
            if self._exact and wanted.itemsize < x_TD.dtype.itemsize:
                raise ConfigError(
                    f"wire.dtype={self._wire.dtype} rounds the hidden states of a model that computes in {x_TD.dtype}, "
                    "which exact numerics exclude. Leave wire.dtype out, or set engine.numerics to fast."
                )
            x_TD = x_TD.to(wanted)
        x_TD = x_TD.cpu().contiguous()
        if x_TD.dtype == torch.bfloat16:
            return "bfloat16", x_TD.view(torch.uint16).numpy()
        return "float32", x_TD.float().numpy()

    def _nobody(self) -> np.ndarray:
        return np.full(self._num_experts + 1, -1, np.int32)

    def _find_settled(self, table: _PlanTable, layer: int) -> _Settled | None:
        """Return where a layer's tokens go if there is no choice to be made."""
        if self._links.avoiding_until_s > monotonic_s():
            return None
        version = self._links.version
        if table.settled_version != version:
            table.settled.clear()
            table.settled_version = version
        if layer not in table.settled:
            table.settled[layer] = self._settle(table, layer)
        return table.settled[layer]

    def _settle(self, table: _PlanTable, layer: int) -> _Settled | None:
        everyone = {link.info.host_id: link for link in self._links.list_living()}
        holders, piece_of_E = table.holders_of(layer), self._nobody()
        links: dict[HostLink[PieceCall], int] = {}
        for expert_id in range(self._num_experts):
            living = [link for host_id in holders.get(expert_id, ()) if (link := everyone.get(host_id)) is not None]
            if len(living) != 1:
                return None
            piece_of_E[expert_id] = links.setdefault(living[0], len(links))
        return _Settled(piece_of_E, list(links))

    def _place(self, call: LayerCall, expert_ids: list[int]) -> None:
        """Choose hosts for some experts of a call and send them its tokens; those without are ``unplaced`` then."""
        table = self._table
        plan_version, holders = table.plan.version, table.holders_of(call.layer)
        everyone = {link.info.host_id: link for link in self._links.list_living()}
        living = {
            expert_id: {
                host_id: everyone[host_id]
                for host_id in holders.get(expert_id, ())
                if host_id in everyone and (expert_id, host_id) not in call.refusing
            }
            for expert_id in expert_ids
        }
        held = {expert_id: links for expert_id, links in living.items() if links}
        self._send(call, self._choose(call, held), plan_version=plan_version)
        orphans = [expert_id for expert_id in expert_ids if expert_id not in held]
        refuges = self._find_refuges(call, orphans, holders, everyone)
        self._send(call, refuges, plan_version=plan_version, on_demand=True)
        call.unplaced = [expert_id for expert_id in expert_ids if expert_id not in held and expert_id not in refuges]

    def _choose(
        self, call: LayerCall, living: Mapping[int, Mapping[str, HostLink[PieceCall]]]
    ) -> dict[int, HostLink[PieceCall]]:
        """Choose a replica of each expert."""
        counts_E = np.bincount(call.tokens.expert_ids_TK.ravel() + 1, minlength=self._num_experts + 1)[1:].tolist()
        links = {host_id: link for by_host in living.values() for host_id, link in by_host.items()}
        choice = choose_replicas(
            {expert_id: counts_E[expert_id] for expert_id in living},
            {expert_id: list(by_host) for expert_id, by_host in living.items()},
            {host_id: link.load for host_id, link in links.items()},
        )
        return {expert_id: links[host_id] for expert_id, host_id in choice.items()}

    def _find_refuges(
        self,
        call: LayerCall,
        orphans: list[int],
        holders: Mapping[int, tuple[str, ...]],
        everyone: Mapping[str, HostLink[PieceCall]],
    ) -> dict[int, HostLink[PieceCall]]:
        """Choose living hosts for experts that none of them holds, unless a holder may be there in a moment."""
        choice = {}
        for expert_id in orphans:
            willing = [host_id for host_id in everyone if (expert_id, host_id) not in call.refusing]
            if willing and not any(self._may_answer_soon(call, expert_id, host) for host in holders.get(expert_id, ())):
                choice[expert_id] = everyone[choose_refuge(LogicalExpert(call.layer, expert_id), willing)]
        return choice

    def _may_answer_soon(self, call: LayerCall, expert_id: int, host_id: str) -> bool:
        link = self._links.get(host_id)
        is_connecting = link is not None and link.state is LinkState.CONNECTING
        return is_connecting or call.refusing.get((expert_id, host_id)) == "overloaded"

    def _send(
        self,
        call: LayerCall,
        choice: Mapping[int, HostLink[PieceCall]],
        *,
        plan_version: int,
        on_demand: bool = False,
    ) -> None:
        if not choice:
            return
        links: dict[HostLink[PieceCall], int] = {}
        for expert_id, link in choice.items():
            call.piece_of_E[expert_id] = call.num_pieces + links.setdefault(link, len(links))
        self._calls.send(call, list(links), plan_version=plan_version, on_demand=on_demand)

    def _combine(self, call: LayerCall) -> torch.Tensor:
        while True:
            version = self._links.version
            for sent in list(call.pieces.values()):
                self._calls.wait(sent, give_up_s=call.give_up_s)
            failed = [sent for sent in call.pieces.values() if sent.failure is not None]
            if not failed and not call.unplaced:
                return self._add(call)
            self._try_again(call, failed, version)

    def _try_again(self, call: LayerCall, failed: list[PieceCall], version: int) -> None:
        """Send what has no result elsewhere, or wait for somebody to send it to."""
        expert_ids = list(call.unplaced)
        wanted = call.list_wanted() if failed else []
        for sent in failed:
            del call.pieces[sent.number]
            own = [expert_id for expert_id in wanted if call.piece_of_E[expert_id] == sent.number]
            _note_failure(call, sent, own)
            expert_ids += own
        now_s = monotonic_s()
        if now_s >= call.give_up_s:
            raise self._describe_failure(call, expert_ids)
        if failed:
            self.statistics.num_retries += 1
            call.num_rounds += 1
        else:
            # Nobody to be asked: until a host comes back, or those that refused may have changed their mind.
            self._links.wait_for_change(version, min(_BACKOFF_S, call.give_up_s - now_s))
            call.refusing.clear()
        # The settled choice of a layer is shared between calls.
        call.piece_of_E = call.piece_of_E.copy()
        self._place(call, expert_ids)

    def _describe_failure(self, call: LayerCall, expert_ids: list[int]) -> ExpertUnavailableError:
        expert_id = min(expert_ids)
        tried = call.failures.get(expert_id, {})
        holders = self._table.holders_of(call.layer).get(expert_id, ())
        for host_id in holders:
            if host_id not in tried and (link := self._links.get(host_id)) is not None:
                tried[host_id] = link.reason
        named = "; ".join(f"{host_id}: {reason}" for host_id, reason in tried.items()) or "no host is known"
        return ExpertUnavailableError(
            f"expert {expert_id} of layer {call.layer}: none of {len(holders)} replicas, and no other host, had a "
            f"result within {self._wire.request_deadline_s:g} s ({named}). Start the hosts again, or raise "
            "wire.request_deadline_s."
        )

    def _add(self, call: LayerCall) -> torch.Tensor:
        y_TD = torch.empty(call.tokens.x_TD.shape)
        answers = {number: sent.y for number, sent in call.pieces.items() if sent.y is not None}
        assert len(answers) == len(call.pieces), "a piece has no answer"
        self._cutter.add(y_TD.numpy(), call.tokens, call.piece_of_E, answers, by_pair=self._exact)
        for sent in call.pieces.values():
            self._calls.release(sent)
        return y_TD


def _note_failure(call: LayerCall, sent: PieceCall, expert_ids: list[int]) -> None:
    assert sent.failure is not None
    host_id = sent.link.info.host_id
    for expert_id in expert_ids:
        call.failures.setdefault(expert_id, {})[host_id] = sent.failure
        if sent.refusal is not None and (not sent.missing or expert_id in sent.missing):
            call.refusing[expert_id, host_id] = sent.refusal


def _split(ids_TK: np.ndarray, max_pairs: int) -> list[slice]:
    """Cut tokens so that no answer is longer than a frame may be."""
    ends = np.cumsum(np.maximum(np.count_nonzero(ids_TK >= 0, axis=1), 1))
    slices, start, used = [], 0, 0
    while start < len(ids_TK):
        end = int(np.searchsorted(ends, used + max_pairs, side="right"))
        slices.append(slice(start, end))
        start, used = end, int(ends[end - 1])
    return slices
