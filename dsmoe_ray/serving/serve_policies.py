"""How many hosts and routers Ray Serve should run, from what they report. Pure; Serve applies the delays.

Serve's controller calls a policy with its context and starts or stops replicas, and Ray's autoscaler machines for them.
"""

from typing import Any

from dsmoe_ray.config_io import parse_config
from dsmoe_ray.serving.autoscaling import HostPoolObservation, compute_hosts_wanted
from dsmoe_ray.serving.config import ServingConfig

UTILIZATION, NEEDED_BYTES, MEMORY_BYTES, LOAD = "utilization", "needed_bytes", "memory_bytes", "load"
"""Names of what replicas report."""


class HostPolicy:
    """Keeps hosts at the target utilization, and enough of them for all experts that must be in memory."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = parse_config(config, ServingConfig, source="the application's config")

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of hosts, and no state."""
        metrics = context.aggregated_metrics or {}
        observation = HostPoolObservation(
            utilizations=tuple(metrics.get(UTILIZATION, {}).values()),
            needed_bytes=int(max(metrics.get(NEEDED_BYTES, {}).values(), default=0)),
            host_memory_bytes=int(min(metrics.get(MEMORY_BYTES, {}).values(), default=0)) or None,
        )
        hosts, scaling = self._config.hosts, self._config.experts
        return compute_hosts_wanted(observation, hosts, scaling, current=context.target_num_replicas), {}


class RouterPolicy:
    """Keeps routers at the target share of their sequences and cache."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = parse_config(config, ServingConfig, source="the application's config")

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of routers, and no state."""
        loads = tuple((context.aggregated_metrics or {}).get(LOAD, {}).values())
        routers, scaling = self._config.routers, self._config.experts
        return decide_routers(
            sum(loads), routers.count, routers.max_count or routers.count, scaling.target_utilization
        ), {}


def decide_routers(total_load: float, least: int, most: int, target: float) -> int:
    """Return how many routers bring their mean load to the target."""
    wanted = -(-total_load // target)
    return int(min(max(wanted, least), most))
