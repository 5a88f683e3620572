"""Where the shards of a run go: how much each asks for, and which must be neighbours. A plan, no effects."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.parallel.config import ParallelConfig

Resources = Mapping[str, float]


@dataclass(frozen=True)
class PlacementPlan:
    """What to reserve."""

    bundles: tuple[dict[str, float], ...]
    """Each lies within one node."""
    bundle_of_rank: tuple[int, ...]
    device: str
    cpus_per_shard: int
    gpus_per_shard: int


def plan_placement(parallel: ParallelConfig, nodes: Sequence[Resources]) -> PlacementPlan:
    """Choose bundles for the shards of a run.

    The ranks that share out one layer's experts exchange tokens in every layer, so they go into one bundle, and thereby
    onto one node, where nodes are large enough; otherwise each shard gets a bundle of its own.

    Args:
        parallel: Degrees of the mesh and what a shard needs.
        nodes: All resources of each node, in use or not.

    Raises:
        ConfigError: the cluster is too small; says what is asked for and what there is.
    """
    gpus = _choose_gpus(parallel, nodes)
    each = {"CPU": float(parallel.cpus_per_shard)} | ({"GPU": float(gpus)} if gpus else {})
    group = {name: amount * parallel.ep for name, amount in each.items()}
    num_groups = parallel.world_size // parallel.ep
    whole_groups = _count_fitting(group, nodes) >= num_groups
    if not whole_groups and _count_fitting(each, nodes) < parallel.world_size:
        raise ConfigError(describe_shortage(parallel, each, nodes))
    bundles = (group,) * num_groups if whole_groups else (each,) * parallel.world_size
    per_bundle = parallel.ep if whole_groups else 1
    return PlacementPlan(
        bundles=bundles,
        bundle_of_rank=tuple(rank // per_bundle for rank in range(parallel.world_size)),
        device="cuda" if gpus else "cpu",
        cpus_per_shard=parallel.cpus_per_shard,
        gpus_per_shard=gpus,
    )


def describe_shortage(parallel: ParallelConfig, each: Resources, nodes: Sequence[Resources]) -> str:
    """Return what is asked for, what there is, and what to change."""
    names = sorted(each)
    asked = " and ".join(f"{each[name]:g} {name}" for name in names)
    total = ", ".join(f"{each[name] * parallel.world_size:g} {name}" for name in names)
    there = "; ".join(", ".join(f"{node.get(name, 0):g} {name}" for name in names) for node in nodes)
    return (
        f"the cluster cannot hold {parallel.world_size} shards of {asked} each ({total} in all); "
        f"its {len(nodes)} node(s) have: {there or 'nothing'}. "
        "Lower parallel.ep, dp_shard, dp_replicate or cpus_per_shard, or add nodes."
    )


def _choose_gpus(parallel: ParallelConfig, nodes: Sequence[Resources]) -> int:
    if parallel.device == "cpu":
        return 0
    if parallel.gpus_per_shard is not None:
        return parallel.gpus_per_shard
    there = sum(node.get("GPU", 0.0) for node in nodes)
    return 1 if parallel.device == "cuda" or there > 0 else 0


def _count_fitting(bundle: Resources, nodes: Sequence[Resources]) -> int:
    return sum(min(int(node.get(name, 0.0) // amount) for name, amount in bundle.items()) for node in nodes)
