"""One application for the time of one command: on a Ray that starts and ends with it, or on a cluster."""

import contextlib
import logging
import math
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.ray_environment import check_answers
from dsmoe_ray.serving.config import ServingConfig
from dsmoe_ray.serving.on_ray.ingress import keep_statistics_local
from dsmoe_ray.serving.on_ray.names import APPLICATION

_OBJECT_STORE_BYTES = 128 << 20
"""Reports and orders are all that goes through it."""


@dataclass(frozen=True, kw_only=True)
class RunningApplication:
    """Where it can be reached."""

    url: str
    """Base of all URLs."""
    ray_address: str
    dashboard_url: str | None


@contextlib.contextmanager
def ray_application(
    config: ServingConfig, build: Callable[[dict[str, Any]], serve.Application], *, address: str | None
) -> Iterator[RunningApplication]:
    """Serve while the block lasts. Requests under way end before it does.

    Args:
        config: What to serve.
        build: Makes the application from the config's values.
        address: Of a cluster; None starts a local Ray.

    Raises:
        ConfigError: there is no cluster at the address, or the application does not start.
    """
    if address is not None:
        check_answers(address)
    config = _with_port(config)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address is None:
            keep_statistics_local()
            context = ray.init(
                address="local",
                num_cpus=_count_cpus(config),
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=True,
                **quiet,
            )
        else:
            context = ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}. Check --address.") from error
    try:
        url = _deploy(config, build, is_local=address is None)
        dashboard = context.dashboard_url
        yield RunningApplication(
            url=url,
            ray_address=ray.get_runtime_context().gcs_address,
            dashboard_url=f"http://{dashboard}" if dashboard else None,
        )
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            serve.delete(APPLICATION)
            if address is None:
                serve.shutdown()
        ray.shutdown()


def _deploy(config: ServingConfig, build: Callable[[dict[str, Any]], serve.Application], *, is_local: bool) -> str:
    http = config.http
    logging_config = LoggingConfig(enable_access_log=False)
    if is_local:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=http.host, port=http.port),
            logging_config=logging_config,
        )
    try:
        serve.run(
            build(config.model_dump(mode="json")), name=APPLICATION, route_prefix="/", logging_config=logging_config
        )
    except RuntimeError as error:
        raise ConfigError(f"the application does not start: {error}") from error
    return f"http://{http.host}:{http.port}"


def _with_port(config: ServingConfig) -> ServingConfig:
    """Return the config with a free port for 0, which Ray Serve does not know."""
    if config.http.port:
        return config
    with socket.create_server((config.http.host, 0)) as listener:
        port = listener.getsockname()[1]
    return config.model_copy(update={"http": config.http.model_copy(update={"port": port})})


def _count_cpus(config: ServingConfig) -> int:
    """Return the logical CPUs of a local Ray: what the application asks for, twice over for a rolling update."""
    routers, hosts = config.routers, config.hosts
    num_routers, num_hosts = routers.max_count or routers.count, hosts.max_count or hosts.count
    return max(os.cpu_count() or 1, 2 * math.ceil(num_routers * routers.num_cpus + num_hosts * hosts.num_cpus))
