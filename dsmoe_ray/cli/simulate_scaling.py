"""``dsmoe simulate-scaling TRACE``: what scaling would do under some traffic, in seconds instead of hours."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dsmoe_ray.config_io import apply_override, load_config, parse_config
from dsmoe_ray.errors import UserError
from dsmoe_ray.serving.placement import PlacementEvent
from dsmoe_ray.serving.simulation.config import SimulationConfig
from dsmoe_ray.serving.simulation.replay import OnWindow, replay
from dsmoe_ray.serving.simulation.report import to_json, to_lines, to_table
from dsmoe_ray.serving.simulation.traces import open_trace


def command(
    trace: Annotated[
        str,
        typer.Argument(
            help="A recording, JSONL or npz with time, layer, expert and tokens; or synthetic:uniform, synthetic:zipf "
            "or synthetic:shifting, with options such as synthetic:zipf,alpha=1.2,layers=40,duration_s=600.",
            show_default=False,
        ),
    ],
    config: Annotated[
        Path | None, typer.Option(help="YAML of the cluster; by default 1,000 hosts.", show_default=False)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Such as hosts=100 or experts.upscale_delay_s=5; repeatable."),
    ] = None,
    events: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write every change of an expert's replicas and its reason.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Replay a routing trace through the scaling decisions, beside whole-model replicas and fixed experts."""
    cluster = _read_config(config, set_ or [])
    traffic = open_trace(trace)
    with ExitStack() as stack:
        on_window = _event_writer(events, stack) if events else None
        report = to_json(replay(traffic, cluster, on_window=on_window), cluster, trace)
    if as_json:
        typer.echo(json.dumps(report))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(to_table(report))
    for line in to_lines(report):
        console.print(line, highlight=False)


def _read_config(path: Path | None, overrides: list[str]) -> SimulationConfig:
    if path:
        return load_config(path, SimulationConfig, overrides=overrides)
    values: dict[str, Any] = {}
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, SimulationConfig, source="--set")


def _event_writer(path: Path, stack: ExitStack) -> OnWindow:
    try:
        file = stack.enter_context(path.open("w", encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--events {path} cannot be written: {error}.") from error

    def write(now_s: float, events: tuple[PlacementEvent, ...]) -> None:
        file.writelines(f"{now_s:.2f} s  {event}\n" for event in events)

    return write
