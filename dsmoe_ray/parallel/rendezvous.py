"""How the ranks of a new world find each other: a store at rank 0, everyone's arrival, then the process groups.

Nothing listens but on the address given and the interface that reaches it.
"""

import os
import sys
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from dsmoe_ray import clock
from dsmoe_ray.errors import ExchangeError
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.mesh import build_mesh
from dsmoe_ray.parallel.network import interface_towards, listen_on

_INTERFACE_CHOSEN_BY_USER = os.environ.get("GLOO_SOCKET_IFNAME")
_ARRIVAL_POLL_S = 0.01
_FLIGHT_RECORDER_ENTRIES = "2000"


def open_store(config: ParallelConfig, *, rank: int, address: str, port: int) -> distributed.Store:
    """Return the store that rank 0 keeps, once every rank has opened it.

    Raises:
        ExchangeError: rank 0 cannot listen or be reached, or ranks did not arrive in time; they are named.
    """
    store = _connect(config, rank=rank, address=address, port=port)
    _await_all(store, config, rank=rank)
    return store


def initialize_groups(
    store: distributed.Store, config: ParallelConfig, *, rank: int, address: str, device: torch.device, backend: str
) -> DeviceMesh:
    """Connect all ranks and return the mesh of their process groups; each rank must call it.

    Raises:
        ExchangeError: ranks could not connect.
    """
    # Gloo listens on the interface named here; otherwise on the one the host name stands for, which may be public.
    os.environ["GLOO_SOCKET_IFNAME"] = _INTERFACE_CHOSEN_BY_USER or interface_towards(address)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _FLIGHT_RECORDER_ENTRIES)
    hook = sys.excepthook
    try:
        distributed.init_process_group(
            "gloo" if backend == "gloo" else "cpu:gloo,cuda:nccl",
            store=store,
            rank=rank,
            world_size=config.world_size,
            timeout=timedelta(seconds=config.timeout_s),
        )
        return build_mesh(config, device)
    except RuntimeError as error:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        raise ExchangeError(f"rank {rank} could not connect to all ranks: {error}") from error
    finally:
        # torch wraps the hook anew each time, and worlds come and go.
        sys.excepthook = hook


def _connect(config: ParallelConfig, *, rank: int, address: str, port: int) -> distributed.Store:
    timeout = timedelta(seconds=config.timeout_s)
    listener = listen_on(address, port) if rank == 0 else None
    try:
        # torch would listen on every interface; it takes over a socket that listens on one.
        return distributed.TCPStore(
            address,
            port,
            config.world_size,
            rank == 0,
            timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach() if listener else None,
        )
    except RuntimeError as error:
        raise ExchangeError(
            f"rank {rank} cannot reach rank 0 at {address} port {port} within {config.timeout_s} s: {error}"
        ) from error


def _await_all(store: distributed.Store, config: ParallelConfig, *, rank: int) -> None:
    """Wait until every rank has opened the store."""
    deadline_s = clock.monotonic_s() + config.timeout_s
    missing = list(range(config.world_size))
    try:
        store.set(f"arrived/{rank}", "")
        while missing := [peer for peer in missing if not store.check([f"arrived/{peer}"])]:
            if clock.monotonic_s() > deadline_s:
                raise ExchangeError(
                    f"rank {rank} waited {config.timeout_s} s for all {config.world_size} ranks; "
                    f"did not arrive: {', '.join(f'rank {peer}' for peer in missing)}"
                )
            clock.sleep_s(_ARRIVAL_POLL_S)
    except RuntimeError as error:
        raise ExchangeError(f"rank {rank} lost rank 0 while waiting for all ranks: {error}") from error
