"""``dsmoe serve ARTIFACT|CONFIG``: an OpenAI-compatible endpoint."""

import asyncio
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from dsmoe_ray.config_io import apply_override, load_config, parse_config
from dsmoe_ray.ray_environment import prepare_local_serving, prepare_to_join
from dsmoe_ray.serving.config import ServingConfig

_INTERRUPTED = 130
_LOOK_S = 0.5


def command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="ARTIFACT|CONFIG",
            help="Directory of a published model, or a YAML file that names one and sets more.",
            show_default=False,
        ),
    ],
    port: Annotated[
        int | None, typer.Option(help="Where to listen; 0 takes a free one. By default 8000.", show_default=False)
    ] = None,
    expert_hosts: Annotated[
        int | None,
        typer.Option(help="Processes that hold the experts; 0, the default, is one process.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one key; may be given many times.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster, HOST:PORT or 'auto', for expert hosts. By default a local Ray is started.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a model until SIGTERM or Ctrl-C; requests under way end first. A second signal ends at once."""
    wanted = list(overrides or ())
    if port is not None:
        wanted.append(f"http.port={port}")
    if expert_hosts is not None:
        wanted.append(f"hosts.count={expert_hosts}")
    config = read_serving_config(source, wanted)
    if config.hosts.count or address is not None:
        _serve_on_ray(config, address)
        return
    import uvloop

    uvloop.run(_serve_in_one_process(config))


def read_serving_config(source: Path, overrides: Sequence[str]) -> ServingConfig:
    """Return what a directory, which is an artifact, or a file, which is a config, says to serve.

    Raises:
        ConfigError: it is neither, or a key or a value is wrong.
    """
    if not source.is_dir():
        return load_config(source, ServingConfig, overrides=overrides)
    values: dict[str, Any] = {"artifact": str(source)}
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, ServingConfig, source="command line")


def _serve_on_ray(config: ServingConfig, address: str | None) -> None:
    if address is None:
        prepare_local_serving()
    else:
        prepare_to_join(address)
    # Ray takes seconds to load, which a mistake in the config need not wait for.
    from dsmoe_ray.serving.app import build_app
    from dsmoe_ray.serving.on_ray.session import ray_application

    stop = threading.Event()

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(_INTERRUPTED)
        stop.set()

    config = config.model_copy(update={"artifact": config.artifact.expanduser().absolute()})
    with ray_application(config, build_app, address=address) as running:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, ask_to_stop)
        typer.echo(f"Ray console: {running.dashboard_url}")
        typer.echo(f"Experts: dsmoe scale --address {running.ray_address}")
        typer.echo(f"Serving {config.artifact} at {running.url}/v1 with {config.hosts.count} expert hosts")
        # A wait without end would keep signals from being handled.
        while not stop.wait(_LOOK_S):
            pass
        typer.echo("Stopping: requests under way end first.", err=True)


async def _serve_in_one_process(config: ServingConfig) -> None:
    # torch takes seconds to load, which a mistake in the config need not wait for.
    from dsmoe_ray.serving.single_process import run_single_process

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask_to_stop() -> None:
        if stop.is_set():
            # The person has decided not to wait for anything, cleaning up included.
            os._exit(_INTERRUPTED)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask_to_stop)
    async with run_single_process(config) as url:
        typer.echo(f"Serving {config.artifact} at {url}/v1")
        await stop.wait()
        typer.echo("Stopping: requests under way end first.", err=True)
