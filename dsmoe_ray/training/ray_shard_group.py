"""Shards as Ray actors in a placement group."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError, WorkerCrashedError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dsmoe_ray.errors import ConfigError, DsmoeError, ExchangeError
from dsmoe_ray.training.expert_shard import THREAD_OF_METHOD, ExpertShard
from dsmoe_ray.training.placement import PlacementPlan
from dsmoe_ray.training.shard_group import ShardSetup
from dsmoe_ray.training.states import Replies

_PROCESS_GONE = (RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError)


class RayCall:
    """One method asked of several actors."""

    def __init__(self, references: Mapping[int, ray.ObjectRef]) -> None:
        self._waiting = dict(references)
        self._values: dict[int, Any] = {}
        self._lost: dict[int, str] = {}
        self._cut_off: dict[int, str] = {}
        self._errors: dict[int, Exception] = {}

    def poll(self, timeout_s: float) -> Replies:
        """Wait until all have answered, at most ``timeout_s``, and return what is known."""
        if self._waiting:
            references = list(self._waiting.values())
            ready = set(ray.wait(references, num_returns=len(references), timeout=timeout_s)[0])
            for rank in [rank for rank, reference in self._waiting.items() if reference in ready]:
                self._take(rank, self._waiting.pop(rank))
        return Replies(self._values, self._lost, self._cut_off, self._errors, tuple(self._waiting))

    def _take(self, rank: int, reference: ray.ObjectRef) -> None:
        try:
            self._values[rank] = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, ExchangeError):
                self._cut_off[rank] = str(cause)
                return
            if not isinstance(cause, DsmoeError):
                # Where it happened tells what went wrong; errors raised on purpose say it themselves.
                cause.add_note(f"raised by rank {rank}:\n{error}")
            self._errors[rank] = cause
        except _PROCESS_GONE as error:
            self._lost[rank] = _describe_loss(error)
        except RayError as error:
            self._errors[rank] = error


class RayShardGroup:
    """The ExpertShard actors of a run."""

    def __init__(self, setup: ShardSetup, placement: PlacementPlan, group: PlacementGroup) -> None:
        self.num_shards = len(placement.bundle_of_rank)
        self._setup, self._placement, self._group = setup, placement, group
        self._actors: dict[int, Any] = {}

    def launch(self, ranks: Sequence[int]) -> None:
        """Begin to start actors for these ranks, killing those they had."""
        for rank in ranks:
            if rank in self._actors:
                ray.kill(self._actors[rank], no_restart=True)
            self._actors[rank] = self._create(rank)

    def ask(self, method: str, *arguments: Any, ranks: Sequence[int] | None = None) -> RayCall:
        """Call a method on these ranks, by default all."""
        asked = range(self.num_shards) if ranks is None else ranks
        options = {"name": f"ExpertShard.{method}"}
        if method in THREAD_OF_METHOD:
            options["concurrency_group"] = THREAD_OF_METHOD[method]
        return RayCall({rank: self._actors[rank].call.options(**options).remote(method, *arguments) for rank in asked})

    def close(self) -> None:
        """Kill all actors and give back their place."""
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors.clear()
        remove_placement_group(self._group)

    def _create(self, rank: int) -> Any:
        placement = self._placement
        # Replacing a lost shard is the coordinator's work, so Ray restarts none. Ray sets OMP_NUM_THREADS to num_cpus
        # before a worker loads torch; a runtime environment would do the same, but costs the use of prestarted workers.
        options: dict[str, Any] = {
            "num_cpus": placement.cpus_per_shard,
            "num_gpus": placement.gpus_per_shard,
            "max_restarts": 0,
            "concurrency_groups": dict.fromkeys(THREAD_OF_METHOD.values(), 1),
        }
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._group, placement_group_bundle_index=placement.bundle_of_rank[rank]
        )
        return ray.remote(**options)(ExpertShard).options(scheduling_strategy=strategy).remote(self._setup, rank=rank)


def reserve(placement: PlacementPlan, *, timeout_s: float) -> PlacementGroup:
    """Reserve the place of all shards at once.

    Raises:
        ConfigError: the resources are not free within ``timeout_s``; says what is asked for and what is free.
    """
    group = placement_group(list(placement.bundles), strategy="PACK")
    if group.wait(timeout_seconds=timeout_s):
        return group
    remove_placement_group(group)
    free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
    raise ConfigError(
        f"the cluster did not free {len(placement.bundles)} x {placement.bundles[0]} within {timeout_s:g} s; "
        f"free now: {free or 'nothing'}. Stop what else is running there, or lower the degrees in the parallel section."
    )


def _describe_loss(error: RayError) -> str:
    """Return the one line of Ray's account that tells the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("The actor is dead") or "exit detail" in line]
    return (telling or lines or [type(error).__name__])[0].partition(" Some common causes")[0][:300]
