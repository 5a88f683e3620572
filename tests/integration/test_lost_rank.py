"""Ranks that die or never come: the others get an error that names them, leave, and go on in a new world."""

import os
import signal
import subprocess
import time

import pytest
import torch
from torch.distributed.tensor import DTensor, Shard

from dsmoe_ray.errors import ExchangeError
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.parallel.collectives import (
    all_reduce_sum_,
    collective_named,
    gather_integers,
    join_world,
    leave_world,
)
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.fsdp import shard_model
from tests.numerics.ranks import RankProcess, free_port, run_in_world, run_on_ranks

CPU = torch.device("cpu")
MODEL = ModelConfig.model_validate(
    {
        "vocab_size": 16,
        "d_model": 8,
        "num_layers": 2,
        "max_seq_len": 8,
        "attention": {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
        "ffn": {"kind": "moe", "num_experts": 4, "d_ff": 4},
    }
)
TIMEOUT_S = 900.0
SOON_S = 120.0
"""Far below the collectives' timeout, so that passing means the failure was noticed and not waited out; and far above
the second or two it takes, as a rank is released only when its neighbours have left, which a busy machine delays."""


def _join(config, rank, port):
    return join_world(config, rank=rank, address="127.0.0.1", port=port, device=CPU)


def _reduce_until_failure(config, rank, port, dies_after):
    """Return the error's text; rank ``dies_after`` kills itself between two collectives."""
    world = _join(config, rank, port)
    weight = DTensor.from_local(torch.full((2, 2), float(rank)), world.mesh["ep"], [Shard(0)])
    assert weight.full_tensor().shape == (2 * config.ep, 2)
    all_reduce_sum_(torch.ones(100_000))
    if dies_after == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        all_reduce_sum_(torch.ones(100_000), name="trunk gradients")
    except ExchangeError as error:
        message = str(error)
    assert time.monotonic() - started < SOON_S
    return message


def _survive(rank, config, port, lost_rank, next_port):
    message = _reduce_until_failure(config, rank, port, lost_rank)
    leave_world()
    # The DTensor of the old world is gone; one of the new world must use the new connections.
    world = _join(config, rank, next_port)
    weight = DTensor.from_local(torch.full((2, 2), float(rank)), world.mesh["ep"], [Shard(0)])
    total = all_reduce_sum_(torch.tensor([rank + 1.0])).item()
    gathered = weight.full_tensor()[:, 0].tolist()
    leave_world()
    return message, total, gathered


def _replace(rank, config, next_port):
    world = _join(config, rank, next_port)
    weight = DTensor.from_local(torch.full((2, 2), float(rank)), world.mesh["ep"], [Shard(0)])
    total = all_reduce_sum_(torch.tensor([rank + 1.0])).item()
    gathered = weight.full_tensor()[:, 0].tolist()
    leave_world()
    return total, gathered


@pytest.mark.parametrize("lost_rank", [0, 1], ids=["rank 0, which keeps the store", "rank 1"])
def test_a_survivor_learns_who_was_lost_and_goes_on_with_a_fresh_process(lost_rank):
    config = ParallelConfig(ep=2, timeout_s=TIMEOUT_S)
    port, next_port = free_port(), free_port()
    ranks = [RankProcess(_survive, rank, config, port, lost_rank, next_port) for rank in range(2)]
    with pytest.raises(AssertionError, match="exit code -9"):
        ranks[lost_rank].result(SOON_S)
    replacement = RankProcess(_replace, lost_rank, config, next_port)
    message, total, gathered = ranks[1 - lost_rank].result(SOON_S)
    assert "trunk gradients failed on rank" in message
    assert f"rank {lost_rank}" in message.lower()
    assert (total, gathered) == (3.0, [0.0, 0.0, 1.0, 1.0])
    assert replacement.result(SOON_S) == (3.0, [0.0, 0.0, 1.0, 1.0])


def _leave_after_failure(rank, config, port):
    message = _reduce_until_failure(config, rank, port, dies_after=3)
    leave_world()
    return message


def test_survivors_that_wait_on_a_survivor_are_released_when_it_leaves():
    config = ParallelConfig(ep=2, dp_replicate=2, timeout_s=TIMEOUT_S)
    port = free_port()
    ranks = [RankProcess(_leave_after_failure, rank, config, port) for rank in range(4)]
    messages = [ranks[rank].result(SOON_S) for rank in range(3)]
    assert all("trunk gradients failed on rank" in message for message in messages)
    assert any("Not heard of" in message and "rank 3" in message for message in messages)


def _lose_a_peer_of_fsdp(rank, config, port):
    world = _join(config, rank, port)
    model = Transformer(MODEL)
    shard_model(model, world, lambda name, shape: torch.ones(shape))
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model(tokens, targets_BS=tokens).loss_sum.backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    message = "no error"
    try:
        with collective_named("step 7"):
            model(tokens, targets_BS=tokens).loss_sum.backward()
    except ExchangeError as error:
        message = str(error)
    del model, world
    leave_world()
    return message


def test_a_lost_peer_of_fsdp_is_an_exchange_error_too():
    config = ParallelConfig(dp_shard=2, timeout_s=TIMEOUT_S)
    port = free_port()
    survivor, _ = [RankProcess(_lose_a_peer_of_fsdp, rank, config, port) for rank in range(2)]
    message = survivor.result(SOON_S)
    assert message.startswith("step 7 failed on rank 0 of 2: ")
    assert "rank 1" in message


def test_ranks_that_never_arrive_are_named():
    config = ParallelConfig(dp_replicate=3, timeout_s=1.0)
    with pytest.raises(AssertionError, match=r"waited 1.0 s for all 3 ranks; did not arrive: rank 1, rank 2"):
        run_on_ranks(_only_join, 1, config, free_port())


def _only_join(rank, config, port):
    _join(config, rank, port)


def _listening_addresses(world):
    all_reduce_sum_(torch.ones(1))
    sockets = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[3].rpartition(":")[0] for line in sockets if f"pid={os.getpid()}," in line]


def test_ranks_listen_on_the_address_they_were_given_only():
    for addresses in run_in_world(_listening_addresses, ParallelConfig(dp_replicate=2)):
        assert set(addresses) == {"127.0.0.1"}


def _gather(world):
    return gather_integers([world.rank, 10 * world.rank], group=None, name="numbers")


def test_integers_of_all_ranks_are_gathered_in_order():
    assert run_in_world(_gather, ParallelConfig(dp_replicate=2)) == [[[0, 0], [1, 10]]] * 2
