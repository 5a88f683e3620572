"""``dsmoe serve ARTIFACT|CONFIG``: an OpenAI-compatible endpoint."""

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dsmoe_ray.config_io import apply_override, load_config, parse_config
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.config import ServingConfig

_INTERRUPTED = 130


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
) -> None:
    """Serve a model until SIGTERM or Ctrl-C; requests under way end first. A second signal ends at once."""
    wanted = list(overrides or ())
    if port is not None:
        wanted.append(f"http.port={port}")
    if expert_hosts is not None:
        wanted.append(f"hosts.count={expert_hosts}")
    config = read_serving_config(source, wanted)
    if config.hosts.count:
        raise ConfigError("hosts.count must be 0 here")
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
