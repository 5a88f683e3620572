"""Ray for the time of one run: the cluster's, or a local one that starts here and ends here."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.ray_environment import check_answers
from dsmoe_ray.training.placement import Resources


@dataclass(frozen=True)
class RaySession:
    """The Ray that this process is connected to."""

    dashboard_url: str | None
    is_local: bool
    """It was started for this run."""


@contextmanager
def ray_session(parallel: ParallelConfig, *, address: str | None) -> Iterator[RaySession]:
    """Connect to Ray, or start it, for as long as the block lasts.

    Args:
        parallel: Of the run; a local Ray gets enough logical CPUs for its shards, however few cores there are.
        address: Of a cluster; None starts a local Ray with its console.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: a Ray Client connection ends with this process's network. Give HOST:PORT of the "
            "cluster's head, or run on the cluster: ray job submit -- python -m dsmoe_ray train CONFIG"
        )
    if address is not None:
        check_answers(address)
    # Calls that fail together with the one that was waited for are left unread on purpose.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    # What goes wrong in a shard comes back as an exception; the rest of its output is in Ray's log files.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            num_cpus = max(os.cpu_count() or 1, parallel.world_size * parallel.cpus_per_shard)
            context = ray.init(address="local", num_cpus=num_cpus, include_dashboard=True, **quiet)
        else:
            context = ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {error}. Check --address and RAY_ADDRESS, or leave both out to "
            "start a local Ray."
        ) from error
    try:
        url = context.dashboard_url
        yield RaySession(dashboard_url=f"http://{url}" if url else None, is_local=address is None)
    finally:
        ray.shutdown()


def list_node_resources() -> list[Resources]:
    """Return all resources of each node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]
