"""The Ray Serve application: one deployment for each kind of process. Start at ``build_app``.

    serve run dsmoe_ray.serving.app:build_app artifact=runs/quickstart/artifact hosts.count=2

Ray Serve starts, watches, scales and replaces replicas, and its handles carry reports to the controller and orders
back; tokens and tensors travel on connections of our own. Replicas are thin shells around plain classes: ``on_ray``.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from dsmoe_ray.config_io import apply_override, parse_config
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.config import ServingConfig
from dsmoe_ray.serving.on_ray.controller import ControllerReplica
from dsmoe_ray.serving.on_ray.gateway import GatewayReplica
from dsmoe_ray.serving.on_ray.host import HostReplica
from dsmoe_ray.serving.on_ray.names import CONTROLLER, GATEWAY, HOST, ROUTER
from dsmoe_ray.serving.on_ray.router import RouterReplica
from dsmoe_ray.serving.process_setup import read_setup
from dsmoe_ray.serving.serve_policies import HostPolicy, RouterPolicy

_STEP_S = 15.0
"""How much longer a router may take to stop than a gateway, and a host than a router."""


def build_app(args: Mapping[str, Any]) -> serve.Application:
    """Return the application that a config describes.

    Args:
        args: The sections of a serving config, or single keys such as ``hosts.count`` whose values are YAML.

    Raises:
        ConfigError: a key or a value is wrong.
        ArtifactError: the artifact cannot be read.
    """
    config = read_args(args)
    # What no process could start with is refused before any does.
    read_setup(config, node_id="", node_address="", secret=b"", directory=Path())
    controller = _deploy_controller().bind(config.model_dump(mode="json"))
    # What a replica starts from; a change in it replaces the replica.
    values = _without_host_counts(config).model_dump(mode="json")
    others = [_deploy_router(config).bind(values, controller)]
    if config.hosts.count:
        others.append(_deploy_host(config).bind(values, controller))
    return _deploy_gateway(config).bind(values, controller, *others)


def read_args(args: Mapping[str, Any]) -> ServingConfig:
    """Return the config that arguments of an application describe; relative paths are made absolute.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    values: dict[str, Any] = {}
    for key, value in args.items():
        if isinstance(value, str):
            apply_override(values, f"{key}={value}")
        elif "." in key:
            raise ConfigError(f"{key}: write a section with its keys below it, or {key}=VALUE on a command line.")
        else:
            values[key] = value
    config = parse_config(values, ServingConfig, source="the application's arguments")
    return config.model_copy(update={"artifact": config.artifact.expanduser().absolute()})


def _without_host_counts(config: ServingConfig) -> ServingConfig:
    """Return the config as replicas need it: that there are hosts is all they must know of how many there are."""
    hosts = config.hosts.model_copy(update={"count": min(config.hosts.count, 1), "max_count": None})
    return config.model_copy(update={"hosts": hosts})


def _deploy_controller() -> serve.Deployment:
    return _make_deployment(ControllerReplica, CONTROLLER, stop_s=5.0, num_cpus=0).options(num_replicas=1)


def _deploy_gateway(config: ServingConfig) -> serve.Deployment:
    gateway = _make_deployment(GatewayReplica, GATEWAY, stop_s=config.http.drain_s + _STEP_S, num_cpus=0)
    return gateway.options(num_replicas=config.gateways, max_surge_percent=100)


def _deploy_router(config: ServingConfig) -> serve.Deployment:
    routers = config.routers
    router = _make_deployment(
        RouterReplica,
        ROUTER,
        stop_s=config.http.drain_s + 2 * _STEP_S,
        num_cpus=routers.num_cpus,
        num_gpus=routers.num_gpus,
    )
    return _scale(router, routers.count, routers.max_count, config, RouterPolicy)


def _deploy_host(config: ServingConfig) -> serve.Deployment:
    hosts = config.hosts
    host = _make_deployment(
        HostReplica,
        HOST,
        stop_s=config.http.drain_s + 3 * _STEP_S,
        num_cpus=hosts.num_cpus,
        num_gpus=hosts.num_gpus,
    )
    return _scale(host, hosts.count, hosts.max_count, config, HostPolicy)


def _make_deployment(
    replica: type, name: str, *, stop_s: float, num_cpus: float, num_gpus: float = 0.0
) -> serve.Deployment:
    make: Callable[[type], serve.Deployment] = serve.deployment(
        name=name,
        # Limits are ours: whatever comes to a replica is taken.
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": num_cpus, "num_gpus": num_gpus},
        graceful_shutdown_timeout_s=stop_s,
        graceful_shutdown_wait_loop_s=0.1,
        # A dead process is noticed within a period; one that hangs within the timeout, and then replaced.
        health_check_period_s=0.5,
        health_check_timeout_s=10.0,
    )
    return make(replica)


def _scale(
    deployment: serve.Deployment, least: int, most: int | None, config: ServingConfig, policy: type
) -> serve.Deployment:
    # A GPU that the old replica holds is not there for a new one beside it.
    surge = 0 if (deployment.ray_actor_options or {}).get("num_gpus") else 100
    if most is None or most <= least:
        return deployment.options(num_replicas=least, max_surge_percent=surge)
    scaling = config.experts
    return deployment.options(
        max_surge_percent=surge,
        autoscaling_config=AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
            look_back_period_s=scaling.look_back_s,
            policy=AutoscalingPolicy(policy_function=policy, policy_kwargs={"config": config.model_dump(mode="json")}),
        ),
    )
