"""The Ray actor around one rank.

It hands every call on to an ``ExpertShardWorker``. Loads no torch where it is only named: the process that coordinates
a run defines the actor, needs no torch, and starts 2.5 seconds sooner without.
"""

from importlib import import_module
from typing import Any

import ray

from dsmoe_ray.training.shard_group import ShardSetup

WORKER_MODULE = "dsmoe_ray.training.shard_worker"
THREAD_OF_METHOD = {"ping": "control", "finish_checkpoint": "saving"}
"""Methods that run beside training, so that neither a long step nor a long save keeps a shard from answering."""


class ExpertShard:
    """One rank of a run, on its own GPU or CPUs."""

    def __init__(self, setup: ShardSetup, *, rank: int) -> None:
        # Nothing here may fail: an exception in an actor's constructor looks like the loss of its process.
        self._setup, self._rank = setup, rank
        self._worker: Any = None

    def __repr__(self) -> str:
        """Return the name shown in logs and in the console."""
        return f"ExpertShard(rank={self._rank})"

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of ``ExpertShardWorker``; ``describe`` comes first, and adds what only Ray knows."""
        if method == "describe":
            if self._worker is None:
                self._worker = import_module(WORKER_MODULE).ExpertShardWorker(self._setup, rank=self._rank)
            node_id = ray.get_runtime_context().get_node_id()
            return self._worker.describe(*arguments, address=ray.util.get_node_ip_address(), node_id=node_id)
        return getattr(self._worker, method)(*arguments)
