"""``dsmoe scale``: what the controller of a running application does and would do, and a few words in it."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from dsmoe_ray.clock import sleep_s
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.ray_environment import prepare_to_join
from dsmoe_ray.serving.controller_events import ControllerEvent
from dsmoe_ray.serving.plan import LogicalExpert
from dsmoe_ray.serving.replica_controller import ControllerStatus

_FOLLOW_S = 0.25
_MOST_LOADS = 10


def command(
    address: Annotated[str, typer.Option(help="Ray cluster, HOST:PORT; 'auto' is the one on this machine.")] = "auto",
    application: Annotated[str, typer.Option(help="Name of the application on Ray Serve.")] = "dsmoe",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would change if all delays had passed; changes nothing.")
    ] = False,
    pin: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER/EXPERT=N", help="Give an expert N replicas whatever its load.", show_default=False),
    ] = None,
    unpin: Annotated[
        list[str] | None, typer.Option(metavar="LAYER/EXPERT", help="Let load decide again.", show_default=False)
    ] = None,
    rollback: Annotated[
        int | None,
        typer.Option(metavar="PLAN", help="Place experts as this plan did, and scale nothing.", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Scale by load again.")] = False,
    events: Annotated[bool, typer.Option("--events", help="Print what happened so far.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print events as they happen, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object; one a line for events.")] = False,
) -> None:
    """Show where experts live, why, and what would change now; pin experts, or go back to an earlier plan."""
    pins = [_parse_pin(text) for text in pin or ()]
    unpins = [_parse_expert(text) for text in unpin or ()]
    prepare_to_join(address)
    # Ray takes seconds to load, which a mistake in the options need not wait for.
    from dsmoe_ray.serving.on_ray.controller_client import open_controller

    with open_controller(address, application=application) as controller:
        for expert, num_replicas in pins:
            controller.pin(expert, num_replicas)
        for expert in unpins:
            controller.pin(expert, None)
        if rollback is not None:
            controller.rollback(rollback)
        if resume:
            controller.resume()
        if events or follow:
            _print_events(controller, follow=follow, as_json=as_json)
        else:
            _print_status(controller.describe(), dry_run=dry_run, as_json=as_json)


def _print_events(controller: Any, *, follow: bool, as_json: bool) -> None:
    number = 0
    while True:
        for event in controller.list_events(number):
            number = event.number
            typer.echo(json.dumps(_event_to_json(event)) if as_json else str(event))
        if not follow:
            return
        sleep_s(_FOLLOW_S)


def _event_to_json(event: ControllerEvent) -> dict[str, Any]:
    values = dataclasses.asdict(event)
    if event.change is not None:
        values["change"]["expert"] = _name(event.change.expert)
    return values


def _print_status(status: ControllerStatus, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_status_to_json(status)))
        return
    plan = status.plan
    frozen = ", frozen until --resume" if status.settings.is_frozen else ""
    typer.echo(f"plan {plan.version}: {len(plan.replicas)} experts on {len(plan.hosts)} hosts{frozen}")
    for host_id, info in plan.hosts.items():
        held = plan.held_by(host_id)
        utilization = status.utilizations.get(host_id, 0.0)
        typer.echo(f"  {host_id} on node {info.node_id[:12]}: {len(held)} experts, {100 * utilization:.0f}% busy")
    hottest = sorted(status.loads.items(), key=lambda item: -item[1])[:_MOST_LOADS]
    for expert, load in hottest:
        typer.echo(f"  expert {_name(expert)}: {load:.1f} tokens/s, {len(plan.replicas.get(expert, ()))} replicas")
    for name, count in status.settings.pinned.items():
        typer.echo(f"  expert {name} is pinned to {count} replicas")
    for expert, host_id in status.missing[:_MOST_LOADS]:
        typer.echo(f"  loading: expert {_name(expert)} on {host_id}")
    if dry_run:
        typer.echo("would change now:" if status.forecast else "nothing would change now")
        for line in status.forecast:
            typer.echo(f"  {line}")


def _status_to_json(status: ControllerStatus) -> dict[str, Any]:
    plan = status.plan
    return {
        "plan": plan.version,
        "hosts": {host_id: dataclasses.asdict(info) for host_id, info in plan.hosts.items()},
        "replicas": {_name(expert): host_ids for expert, host_ids in plan.replicas.items()},
        "cold": sorted(_name(expert) for expert in plan.cold),
        "loading": [[_name(expert), host_id] for expert, host_id in status.missing],
        "utilizations": status.utilizations,
        "tokens_per_s": {_name(expert): load for expert, load in status.loads.items()},
        "pinned": dict(status.settings.pinned),
        "is_frozen": status.settings.is_frozen,
        "plans": status.versions,
        "forecast": status.forecast,
    }


def _parse_pin(text: str) -> tuple[LogicalExpert, int]:
    name, separator, count = text.partition("=")
    if not separator or not count.isdecimal():
        raise ConfigError(f"--pin {text!r} is not of the form LAYER/EXPERT=N, e.g. --pin 3/17=2.")
    return _parse_expert(name), int(count)


def _parse_expert(text: str) -> LogicalExpert:
    layer, separator, expert_id = text.partition("/")
    if not separator or not layer.isdecimal() or not expert_id.isdecimal():
        raise ConfigError(f"{text!r} names no expert; write LAYER/EXPERT, e.g. 3/17.")
    return LogicalExpert(int(layer), int(expert_id))


def _name(expert: LogicalExpert) -> str:
    return f"{expert.layer}/{expert.expert_id}"
