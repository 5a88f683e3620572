"""One rank of a run as the coordinator drives it: a plain class, which ``expert_shard.py`` puts into a Ray actor.

A shard lives through several generations of the world. After a peer was lost its collective fails; it leaves, keeps its
process, and joins the next world under a new port, with a new trainer and the state of a checkpoint.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.errors import ExchangeError, TrainingError
from dsmoe_ray.parallel.collectives import collective_named, join_world, leave_world
from dsmoe_ray.training.checkpoint import CheckpointWriter, SaveHandle
from dsmoe_ray.training.checkpoint_commit import WrittenPart
from dsmoe_ray.training.metrics import EvalMetrics, StepMetrics
from dsmoe_ray.training.run_directory import read_probe
from dsmoe_ray.training.shard_group import ShardDescription, ShardSetup, ShardStatus
from dsmoe_ray.training.train_step import Trainer

R = TypeVar("R")


class ExpertShardWorker:
    """One rank: its place in the world, its trainer and its saves.

    Methods are called one at a time, except ``ping`` and ``finish_checkpoint``, which may run beside any other.
    """

    def __init__(self, setup: ShardSetup, *, rank: int) -> None:
        self._setup, self._rank = setup, rank
        self._trainer: Trainer | None = None
        self._writer: CheckpointWriter | None = None
        self._save: SaveHandle | None = None
        self._busy_since_s: float | None = None
        self._failure: TrainingError | None = None

    def describe(self, probe: Path, *, address: str = "127.0.0.1", node_id: str = "") -> ShardDescription:
        """Tell where this shard is, as far as its caller knows, and what it reads from ``probe``."""
        with socket.socket() as listener:
            # Free now; should it be taken by the time it is used, joining fails and is tried again with another.
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        return ShardDescription(
            host=socket.gethostname(),
            address=address,
            node_id=node_id,
            process_id=os.getpid(),
            free_port=port,
            probe=read_probe(probe),
        )

    def join(self, address: str, port: int) -> None:
        """Meet the other ranks and build the trainer, with weights from the seed or ``model.init_from``.

        Raises:
            ExchangeError: not all ranks came in time.
        """
        setup, config = self._setup, self._setup.config
        torch.set_num_threads(config.parallel.cpus_per_shard)
        # The first of those that are visible here, and the only one.
        device = torch.device("cuda", 0) if setup.device == "cuda" else torch.device("cpu")
        world = join_world(config.parallel, rank=self._rank, address=address, port=port, device=device)
        held_out = None if setup.held_out is None else TokenShards.open(setup.held_out)
        self._trainer = Trainer(config, world=world, data=TokenShards.open(setup.data), held_out=held_out)
        self._writer = CheckpointWriter(setup.checkpoints, mesh=world.mesh)

    def restore(self, checkpoint: Path | None) -> int:
        """Load a checkpoint, or keep the first weights; return the number of steps done."""
        trainer = self._joined()
        if checkpoint is not None:
            trainer.restore(checkpoint)
        return trainer.step

    def run_steps(self, num_steps: int) -> list[StepMetrics]:
        """Do steps and return their metrics, equal on all ranks.

        When a step raises ``TrainingError``, those before it are returned first, and the next call raises it.

        Raises:
            ExchangeError: a peer is gone; from then on every call fails likewise until ``leave``.
            TrainingError: the loss stays non-finite.
        """
        trainer = self._joined()
        rows: list[StepMetrics] = []
        try:
            for _ in range(num_steps):
                rows.append(self._guarded(trainer.run_step))
        except TrainingError as error:
            if not rows:
                raise
            self._failure = error
        return rows

    def evaluate(self) -> EvalMetrics:
        """Measure held-out loss together with the other ranks."""
        trainer = self._joined()
        return self._guarded(trainer.evaluate)

    def start_checkpoint(self, step: int) -> None:
        """Copy the state and begin to write it; ``step`` steps are done."""
        trainer = self._joined()
        assert self._writer is not None and trainer.step == step
        self._save = self._writer.start_save(trainer.checkpoint_state(), step=step)

    def finish_checkpoint(self) -> WrittenPart:
        """Wait until the copy is on the disk and tell what was written."""
        assert self._save is not None
        return self._save.result()

    def leave(self) -> None:
        """Drop everything that belongs to this world; does nothing outside of one."""
        self._trainer, self._save = None, None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        leave_world()

    def ping(self) -> ShardStatus:
        """Tell that the process is alive, and how long its current step has been running."""
        trainer, since_s = self._trainer, self._busy_since_s
        return ShardStatus(
            step=0 if trainer is None else trainer.step, busy_s=None if since_s is None else monotonic_s() - since_s
        )

    def _joined(self) -> Trainer:
        if self._failure is not None:
            raise self._failure
        if self._trainer is None:
            raise ExchangeError(f"rank {self._rank} is not in a world")
        return self._trainer

    def _guarded(self, work: Callable[[], R]) -> R:
        """Run collective work; once it failed, calls that are already queued must not enter the broken world again."""
        cause = None
        self._busy_since_s = monotonic_s()
        try:
            # Our own collectives carry their names; FSDP2's raise a bare RuntimeError.
            with collective_named("a collective of FSDP2"):
                return work()
        except ExchangeError as error:
            cause = str(error)
        finally:
            self._busy_since_s = None
        self._trainer = None
        # Raised outside the handler: its frames would keep the broken connections open.
        raise ExchangeError(cause)
