"""The dense all-to-all: every token of an ``ep`` group visits every rank's experts, and the outputs come back summed.

Each rank gathers the hidden states of all owners and the gates for its own experts, runs its experts on all of them,
and the partial sums return to the tokens' owners. Shapes are static; nothing is sorted, dropped or waited for by the
host beyond the transfers themselves.

Two ways carry it. ``MessageExchange`` (gloo) sends each peer its tensors straight from where they lie and adds what
comes back in rank order, in float32: nothing is packed, and a sum does not depend on timing. ``CollectiveExchange``
(NCCL) packs tokens and gates into one all-gather, and returns by reduce-scatter. No buffer is used twice: autograd
keeps what was gathered until the backward pass, and sums are formed in the buffers they arrive in.

Shape suffixes: T tokens owned here, N = n * T tokens of all owners by owner, D model width, E experts, L = E / n
experts held here, n ranks of the group, B bytes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from dsmoe_ray.errors import ExchangeError
from dsmoe_ray.model.dispatch import LOCAL_EXCHANGE, RunSparse, TokenExchange
from dsmoe_ray.parallel.collectives import (
    Transfer,
    gather_integers,
    start_all_gather,
    start_all_to_all,
    start_messages,
    start_reduce_scatter,
)
from dsmoe_ray.parallel.mesh import World
from dsmoe_ray.parallel.sparse_exchange import sparse_expert_parallel

V = TypeVar("V")
_ALIGNMENT_BYTES = 16


def build_exchange(world: World) -> TokenExchange:
    """Return the exchange for this rank: local when it holds all experts, otherwise what suits the backend."""
    if world.config.ep == 1:
        return LOCAL_EXCHANGE
    return MessageExchange(world) if world.backend == "gloo" else CollectiveExchange(world)


@dataclass(frozen=True)
class Arriving(Generic[V]):
    """A value on its way; ``finish`` makes it of what arrived."""

    transfers: tuple[Transfer, ...]
    finish: Callable[[], V]

    def wait(self) -> V:
        """Return the value.

        Raises:
            ExchangeError: a peer is dead, hung or unreachable.
        """
        for transfer in self.transfers:
            transfer.wait()
        return self.finish()


class _DenseAllToAll:
    """What both ways have in common."""

    def __init__(self, world: World) -> None:
        self.num_chunks = world.config.exchange_chunks
        self._world = world
        self._num_ranks = world.config.ep
        self._agreed_num_tokens: int | None = None

    @property
    def _group(self) -> ProcessGroup:
        # Looked up each time: holding it would keep its connections open after leave_world().
        return self._world.group("ep")

    def local_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the experts held here; the gradient goes back to the sharded weight."""
        return weight.to_local() if isinstance(weight, DTensor) else weight

    def run_sparse(
        self, x_TD: torch.Tensor, gates_TE: torch.Tensor, selected_TE: torch.Tensor, run: RunSparse
    ) -> torch.Tensor:
        """Send each token once to every rank that holds one of its selected experts; return the sums ``(T, D)``."""
        return sparse_expert_parallel(x_TD, gates_TE, selected_TE, world=self._world, run_experts=run)

    def _agree_on(self, num_tokens: int) -> None:
        """Check, whenever the number changes, that all ranks hold equally many tokens: gloo aborts when they do not."""
        if num_tokens == self._agreed_num_tokens:
            return
        found = [row[0] for row in gather_integers([num_tokens], group=self._group, name="agreement on token counts")]
        if set(found) != {num_tokens}:
            raise ExchangeError(
                f"the ranks of an ep group must hold equally many tokens; found {found} by ep rank. "
                "Give every rank the same number of sequences of the same length."
            )
        self._agreed_num_tokens = num_tokens


class MessageExchange(_DenseAllToAll):
    """Dense all-to-all by messages between pairs of ranks; tensors on a GPU pass through host memory."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        me, num_ranks = world.ep_rank, world.config.ep
        self._me = me
        # Starting behind oneself keeps all ranks from sending to rank 0 first.
        self._peers = [(me + offset) % num_ranks for offset in range(1, num_ranks)]

    def start_gather(self, x_TD: torch.Tensor, gates_TE: torch.Tensor) -> Arriving[tuple[torch.Tensor, torch.Tensor]]:
        """Bring every owner's tokens here with their gates for the experts held here: ``(N, D)`` and ``(N, L)``."""
        num_tokens, num_experts = gates_TE.shape
        self._agree_on(num_tokens)
        by_holder = (num_tokens, self._num_ranks, num_experts // self._num_ranks)
        mine_TD, mine_nTL = x_TD.contiguous().cpu(), gates_TE.view(by_holder).transpose(0, 1).contiguous().cpu()
        x_nTD = mine_TD.new_empty(self._num_ranks, *mine_TD.shape)
        gates_nTL = torch.empty_like(mine_nTL)
        transfer = self._start(
            "gather of tokens",
            outgoing=[(peer, tensor) for peer in self._peers for tensor in (mine_TD, mine_nTL[peer])],
            incoming=[(peer, tensor) for peer in self._peers for tensor in (x_nTD[peer], gates_nTL[peer])],
        )
        x_nTD[self._me].copy_(mine_TD)
        gates_nTL[self._me].copy_(mine_nTL[self._me])
        return Arriving((transfer,), lambda: (self._home(x_nTD.flatten(0, 1)), self._home(gates_nTL.flatten(0, 1))))

    def start_reduce(self, y_ND: torch.Tensor) -> Arriving[torch.Tensor]:
        """Send partial outputs back to their owners; the value is the sum for the tokens owned here ``(T, D)``."""
        return self._start_sum("return of outputs", self._by_owner(y_ND))

    def start_gather_grad(self, dy_TD: torch.Tensor) -> Arriving[torch.Tensor]:
        """Bring every owner's output gradients here ``(N, D)``."""
        dy_TD = dy_TD.contiguous().cpu()
        dy_nTD = dy_TD.new_empty(self._num_ranks, *dy_TD.shape)
        transfer = self._start(
            "gather of output gradients",
            outgoing=[(peer, dy_TD) for peer in self._peers],
            incoming=[(peer, dy_nTD[peer]) for peer in self._peers],
        )
        dy_nTD[self._me].copy_(dy_TD)
        return Arriving((transfer,), lambda: self._home(dy_nTD.flatten(0, 1)))

    def start_reduce_grad(
        self, dx_ND: torch.Tensor, dgates_NL: torch.Tensor
    ) -> Arriving[tuple[torch.Tensor, torch.Tensor]]:
        """Send input gradients back, summed, and gate gradients, side by side: ``(T, D)`` and ``(T, E)``."""
        dgates_nTL = self._by_owner(dgates_NL)
        returned_nTL = torch.empty_like(dgates_nTL)
        summing = self._start_sum("return of input gradients", self._by_owner(dx_ND))
        transfer = self._start(
            "return of gate gradients",
            outgoing=[(peer, dgates_nTL[peer]) for peer in self._peers],
            incoming=[(peer, returned_nTL[peer]) for peer in self._peers],
        )
        returned_nTL[self._me].copy_(dgates_nTL[self._me])
        return Arriving((transfer,), lambda: (summing.wait(), self._home(_side_by_side(returned_nTL))))

    def _start_sum(self, name: str, partials_nTD: torch.Tensor) -> Arriving[torch.Tensor]:
        parts = [
            partials_nTD[rank] if rank == self._me else torch.empty_like(partials_nTD[rank])
            for rank in range(self._num_ranks)
        ]
        transfer = self._start(
            name,
            outgoing=[(peer, partials_nTD[peer]) for peer in self._peers],
            incoming=[(peer, parts[peer]) for peer in self._peers],
        )
        return Arriving((transfer,), lambda: self._home(_sum_in_order(parts, keep=self._me)))

    def _start(
        self, name: str, *, outgoing: list[tuple[int, torch.Tensor]], incoming: list[tuple[int, torch.Tensor]]
    ) -> Transfer:
        return start_messages(outgoing, incoming, self._group, name)

    def _by_owner(self, tensor_N: torch.Tensor) -> torch.Tensor:
        num_tokens = tensor_N.shape[0] // self._num_ranks
        return tensor_N.contiguous().cpu().view(self._num_ranks, num_tokens, tensor_N.shape[1])

    def _home(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._world.device)


class CollectiveExchange(_DenseAllToAll):
    """Dense all-to-all by all-gather and reduce-scatter; sums are formed in the type of the tensors."""

    def start_gather(self, x_TD: torch.Tensor, gates_TE: torch.Tensor) -> Arriving[tuple[torch.Tensor, torch.Tensor]]:
        """Bring every owner's tokens here with their gates for the experts held here: ``(N, D)`` and ``(N, L)``."""
        self._agree_on(x_TD.shape[0])
        packed_TB = pack_rows(x_TD, gates_TE)
        packed_NB = packed_TB.new_empty(self._num_ranks * packed_TB.shape[0], packed_TB.shape[1])
        transfer = start_all_gather(packed_NB, packed_TB, self._group, "gather of tokens")
        num_held = gates_TE.shape[1] // self._num_ranks
        mine = slice(self._world.ep_rank * num_held, (self._world.ep_rank + 1) * num_held)

        def unpack() -> tuple[torch.Tensor, torch.Tensor]:
            x_ND, gates_NE = unpack_rows(packed_NB, x_TD, gates_TE)
            return x_ND, gates_NE[:, mine]

        return Arriving((transfer,), unpack)

    def start_reduce(self, y_ND: torch.Tensor) -> Arriving[torch.Tensor]:
        """Send partial outputs back to their owners; the value is the sum for the tokens owned here ``(T, D)``."""
        y_TD = y_ND.new_empty(y_ND.shape[0] // self._num_ranks, y_ND.shape[1])
        transfer = start_reduce_scatter(y_TD, y_ND.contiguous(), self._group, "return of outputs")
        return Arriving((transfer,), lambda: y_TD)

    def start_gather_grad(self, dy_TD: torch.Tensor) -> Arriving[torch.Tensor]:
        """Bring every owner's output gradients here ``(N, D)``."""
        dy_ND = dy_TD.new_empty(self._num_ranks * dy_TD.shape[0], dy_TD.shape[1])
        transfer = start_all_gather(dy_ND, dy_TD.contiguous(), self._group, "gather of output gradients")
        return Arriving((transfer,), lambda: dy_ND)

    def start_reduce_grad(
        self, dx_ND: torch.Tensor, dgates_NL: torch.Tensor
    ) -> Arriving[tuple[torch.Tensor, torch.Tensor]]:
        """Send input gradients back, summed, and gate gradients, side by side: ``(T, D)`` and ``(T, E)``."""
        num_tokens = dx_ND.shape[0] // self._num_ranks
        dx_TD = dx_ND.new_empty(num_tokens, dx_ND.shape[1])
        returned_nTL = dgates_NL.new_empty(self._num_ranks, num_tokens, dgates_NL.shape[1])
        transfers = (
            start_reduce_scatter(dx_TD, dx_ND.contiguous(), self._group, "return of input gradients"),
            start_all_to_all(
                returned_nTL.flatten(0, 1), dgates_NL.contiguous(), self._group, "return of gate gradients"
            ),
        )
        return Arriving(transfers, lambda: (dx_TD, _side_by_side(returned_nTL)))


def pack_rows(x_TD: torch.Tensor, gates_TE: torch.Tensor) -> torch.Tensor:
    """Lay each token's hidden state and its gates, whatever their types, side by side as bytes ``(T, B)``."""
    parts = []
    for tensor in (x_TD, gates_TE):
        as_bytes = tensor.contiguous().view(torch.uint8)
        padding_bytes = -as_bytes.shape[1] % _ALIGNMENT_BYTES
        # Aligned rows can be read in place, as strided matrices, by the GEMMs that follow.
        parts += [as_bytes, as_bytes.new_zeros(len(tensor), padding_bytes)] if padding_bytes else [as_bytes]
    return torch.cat(parts, dim=1)


def unpack_rows(packed_NB: torch.Tensor, *like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return views of packed rows with the widths and types of ``like``, bit for bit what was packed."""
    views, start = [], 0
    for tensor in like:
        width_bytes = tensor.shape[1] * tensor.element_size()
        views.append(packed_NB[:, start : start + width_bytes].view(tensor.dtype))
        start += width_bytes + -width_bytes % _ALIGNMENT_BYTES
    return tuple(views)


def _sum_in_order(parts: list[torch.Tensor], *, keep: int) -> torch.Tensor:
    """Add by rank, in float32 or wider; only ``parts[keep]`` is left as it was."""
    if parts[0].element_size() < torch.float32.itemsize:
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(parts[0].dtype)
    # a + b is b + a to the bit, so the first sum may be formed in either of the two buffers.
    first, second = (parts[1], parts[0]) if keep == 0 else (parts[0], parts[1])
    total = first.add_(second)
    for part in parts[2:]:
        total += part
    return total


def _side_by_side(tensor_nTL: torch.Tensor) -> torch.Tensor:
    """Return ``(T, n * L)``: the experts of all ranks next to each other."""
    return tensor_nTL.transpose(0, 1).flatten(1)
