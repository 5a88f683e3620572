"""Joining and leaving a world of ranks, and the few collectives that are not part of an exchange.

A process is in one world at a time, as ``torch.distributed`` has one default group. After a failure it leaves, and
joins the next world under a new port. What was sharded over the old one (model, optimizer, exchange) must go too: it
holds the old connections, and peers that still wait on this rank are released only when those close.
Nothing here pickles.
"""

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import distributed

from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.failures import FailureBoard, FailuresNamed
from dsmoe_ray.parallel.mesh import World
from dsmoe_ray.parallel.rendezvous import initialize_groups, open_store

# torch 2.13 renamed both; 2.11 has the old names only.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


@dataclass
class _Membership:
    """The world this process is in."""

    world: World
    board: FailureBoard


_membership: _Membership | None = None


def join_world(
    config: ParallelConfig,
    *,
    rank: int,
    address: str,
    port: int,
    device: torch.device,
    backend: Literal["gloo", "nccl"] | None = None,
) -> World:
    """Meet the other ranks and build the mesh; a world of one rank needs no network and ignores address and port.

    Args:
        config: Degrees of the mesh; ``timeout_s`` bounds the meeting and every collective after it.
        rank: This rank, in ``[0, config.world_size)``.
        address: Rank 0's address on a private network; rank 0 listens there and nowhere else.
        port: A free port of rank 0's; a new one for each world.
        device: Where this rank computes.
        backend: What carries tensors of ``device``; by default NCCL on CUDA and gloo on CPU. Gloo on CUDA lets ranks
            share one GPU.

    Raises:
        ExchangeError: ranks did not arrive in time (they are named), or the address cannot be used.
        ValueError: this process is still in a world.
    """
    global _membership
    if _membership is not None or distributed.is_initialized():
        raise ValueError("this process is still in a world; call leave_world() before joining another")
    backend = backend or ("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        device = _claim_gpu(device)
    if config.world_size == 1:
        return World(rank=rank, config=config, device=device, mesh=None, backend=backend)
    store = open_store(config, rank=rank, address=address, port=port)
    mesh = initialize_groups(store, config, rank=rank, address=address, device=device, backend=backend)
    world = World(rank=rank, config=config, device=device, mesh=mesh, backend=backend)
    _membership = _Membership(world, FailureBoard(store, rank=rank, world_size=config.world_size))
    return world


def leave_world() -> None:
    """Close this rank's connections, also after a failed collective; does nothing outside a world.

    Collectives in flight end first: at once where a peer is dead, after ``timeout_s`` where one hangs. Call it outside
    the handler of an ``ExchangeError``, whose frames may hold connections open.
    """
    global _membership
    if _membership is None:
        return
    world, _membership = _membership.world, None
    # The mesh outlives the world where a model's DTensors hold it, and would keep every group open.
    getattr(world.mesh, "_pg_registry", {}).clear()
    if world.backend == "nccl":
        # Destroying waits for collectives that a dead peer never finishes; aborting does not.
        distributed.distributed_c10d._abort_process_group()
    else:
        distributed.destroy_process_group()
    gc.collect()


def collective_named(name: str) -> AbstractContextManager[None]:
    """Return a block that turns a failed collective, also one of FSDP2's, into an ``ExchangeError`` naming ``name``."""
    return FailuresNamed(name, _membership.board if _membership else None)


@dataclass(frozen=True)
class Transfer:
    """A collective on its way; holds its tensors until it is done."""

    works: tuple[distributed.Work, ...]
    name: str
    tensors: tuple[torch.Tensor, ...]

    def wait(self) -> None:
        """Block until the result is here (on CUDA: until it is ordered before what follows on this stream).

        Raises:
            ExchangeError: a peer is dead, hung or unreachable.
        """
        with collective_named(self.name):
            for work in self.works:
                work.wait()


def start_all_gather(output: torch.Tensor, mine: torch.Tensor, group: distributed.ProcessGroup, name: str) -> Transfer:
    """Start bringing every rank's ``mine``, by rank, into ``output``; both contiguous."""
    return _start(name, (output, mine), _all_gather, group)


def start_all_to_all(
    output: torch.Tensor,
    outgoing: torch.Tensor,
    group: distributed.ProcessGroup,
    name: str,
    *,
    rows_received: list[int] | None = None,
    rows_sent: list[int] | None = None,
) -> Transfer:
    """Start sending the n-th part of ``outgoing`` to rank n, filling ``output`` by sender; equal parts by default."""
    return _start(name, (output, outgoing), distributed.all_to_all_single, group, rows_received, rows_sent)


def start_messages(
    outgoing: Sequence[tuple[int, torch.Tensor]],
    incoming: Sequence[tuple[int, torch.Tensor]],
    group: distributed.ProcessGroup,
    name: str,
) -> Transfer:
    """Start sending tensors to peers and filling others from peers, given with their position in the group.

    Messages between two ranks arrive in the order they were sent, so both sides must list them in the same order.
    """
    with collective_named(name):
        works = [distributed.irecv(tensor, group=group, group_src=peer) for peer, tensor in incoming]
        works += [distributed.isend(tensor, group=group, group_dst=peer) for peer, tensor in outgoing]
    # torch gives None for a rank outside the group only.
    works_here = tuple(work for work in works if work is not None)
    return Transfer(works_here, name, tuple(tensor for _, tensor in (*outgoing, *incoming)))


def start_reduce_scatter(
    output: torch.Tensor, partials: torch.Tensor, group: distributed.ProcessGroup, name: str
) -> Transfer:
    """Start summing over ranks, each keeping the part of its own position."""
    return _start(name, (output, partials), _reduce_scatter, group)


def start_all_reduce_sum_(tensor: torch.Tensor, group: distributed.ProcessGroup | None, name: str) -> Transfer:
    """Start summing ``tensor`` over a group, by default all ranks, in place."""
    return _start(name, (tensor,), distributed.all_reduce, group)


def all_reduce_sum_(
    tensor: torch.Tensor, *, group: distributed.ProcessGroup | None = None, name: str = "all-reduce"
) -> torch.Tensor:
    """Sum ``tensor`` over a group, by default all ranks, in place; every rank gets the same bits. Alone, return it.

    Raises:
        ExchangeError: a peer is dead, hung or unreachable.
    """
    if _membership is not None:
        start_all_reduce_sum_(tensor, group, name).wait()
    return tensor


def gather_integers(values: Sequence[int], *, group: distributed.ProcessGroup | None, name: str) -> list[list[int]]:
    """Return every rank's integers by rank; each gives equally many. Travels on the CPU.

    Raises:
        ExchangeError: a peer is dead, hung or unreachable.
    """
    mine = torch.tensor(values, dtype=torch.int64)
    everyone = torch.empty((distributed.get_world_size(group), len(values)), dtype=torch.int64)
    _start(name, (everyone.view(-1), mine), _all_gather, group).wait()
    return everyone.tolist()


def _start(
    name: str, tensors: tuple[torch.Tensor, ...], collective: Any, group: distributed.ProcessGroup | None, *options: Any
) -> Transfer:
    with collective_named(name):
        work = collective(*tensors, *options, group=group, async_op=True)
    return Transfer((work,), name, tensors)


def _claim_gpu(device: torch.device) -> torch.device:
    """Make a GPU this process's own before the mesh guesses one; without an index, the current one."""
    torch.cuda.init()
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    torch.cuda.set_device(device)
    return device
