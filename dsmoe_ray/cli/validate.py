"""``dsmoe validate CONFIG``: check a config and print what the run would cost."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dsmoe_ray.config_io import load_config
from dsmoe_ray.model.accounting import ParameterCounts
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.validation import Report, build_report

SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
BINARY_SCALES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))


def command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Change one key; may be given many times.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check a config; print its parameters, FLOPs, memory and traffic. Starts nothing and needs no cluster."""
    report = build_report(load_config(config, TrainingRunConfig, overrides=overrides or ()))
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=2))
    else:
        print_report(report, Console())
    for check in report.failed:
        typer.echo(f"Error: {config}: {check.detail}", err=True)
    raise typer.Exit(2 if report.failed else 0)


def print_report(report: Report, console: Console) -> None:
    """Print the tables and checks of a report."""
    head = (
        f"{report.name}: {report.num_steps} steps, {format_count(report.num_tokens)} tokens, {report.num_ranks} rank(s)"
    )
    console.print(Text(head, style="bold"))
    tables = (_parameters(report), _flops(report), _memory(report), _traffic(report), _checks(report))
    console.print(Group(*(part for table in tables for part in ("", table))))


def format_count(value: float) -> str:
    """Return a number with four digits and a decimal prefix, ``1.067G``."""
    scale, unit = next((pair for pair in SCALES if abs(value) >= pair[0]), SCALES[-1])
    return f"{value / scale:.4g}{unit}"


def format_bytes(value: float) -> str:
    """Return a number of bytes with a binary prefix, ``1.5 GiB``."""
    scale, unit = next((pair for pair in BINARY_SCALES if abs(value) >= pair[0]), BINARY_SCALES[-1])
    return f"{value / scale:.4g} {unit}"


def _parameters(report: Report) -> Table:
    total, active = report.parameters, report.active
    table = _new_table("parameters", "total", f"active ({report.deployed_routing})", "share")
    for name in ("embedding", "head", "attention", "ffn", "routers", "norms", "non_embedding", "total"):
        table.add_row(name.replace("_", "-"), format_count(getattr(total, name)), *_active_cells(total, active, name))
    return table


def _active_cells(total: ParameterCounts, active: ParameterCounts | None, name: str) -> tuple[str, str]:
    if active is None:
        return "known after evaluation", ""
    used, of = getattr(active, name), getattr(total, name)
    return format_count(used), f"{used / of:.0%}" if of else ""


def _flops(report: Report) -> Table:
    flops = report.flops_per_token
    table = _new_table("per token", "")
    table.add_row("forward, all experts", f"{format_count(flops.forward)}FLOP")
    if flops.forward_deployed is not None:
        table.add_row("forward, deployed routing", f"{format_count(flops.forward_deployed)}FLOP")
    table.add_row("training", f"{format_count(flops.training)}FLOP")
    if flops.training_with_recomputation != flops.training:
        table.add_row("training with recomputation", f"{format_count(flops.training_with_recomputation)}FLOP")
    table.add_row("training, whole run", f"{format_count(flops.training * report.num_tokens)}FLOP")
    if report.decode_bytes is not None:
        table.add_row("read to decode, deployed routing, bf16", format_bytes(report.decode_bytes))
    return table


def _memory(report: Report) -> Table:
    memory = report.memory
    table = _new_table("memory per rank, estimated", "")
    for name in ("weights", "gradients", "optimizer", "working_copies", "activations", "gathered_tokens", "total"):
        table.add_row(name.replace("_", " "), format_bytes(getattr(memory, f"{name}_bytes")))
    return table


def _traffic(report: Report) -> Table:
    traffic = report.traffic
    table = _new_table("sent per rank and step", "")
    table.add_row("token exchange, one layer", format_bytes(traffic.exchange_per_layer_bytes))
    table.add_row("token exchange, all layers", format_bytes(traffic.exchange_bytes))
    table.add_row("gradient reduction", format_bytes(traffic.reduction_bytes))
    table.add_row("weight gathering", format_bytes(traffic.gather_bytes))
    return table


def _checks(report: Report) -> Table:
    colors = {"passed": "green", "warning": "yellow", "failed": "red"}
    table = Table("check", "", "", box=None, pad_edge=False)
    for check in report.checks:
        # Text, not strings: rich would take brackets in paths for markup.
        table.add_row(check.name, Text(check.status, style=colors[check.status]), Text(check.detail))
    return table


def _new_table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if index else "left")
    return table
