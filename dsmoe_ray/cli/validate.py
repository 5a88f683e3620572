"""``dsmoe validate CONFIG``: check a config and print what the run would cost."""

import json
import sys
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

COUNT_SCALES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
FLOP_SCALES = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
BYTE_SCALES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
# Wide enough for every line: a log file has no width of its own.
LOG_WIDTH = 140


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
        print_report(report, Console(width=None if sys.stdout.isatty() else LOG_WIDTH))
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
    """Return a number of parameters or tokens with four digits, ``1070M``."""
    if 1e9 <= abs(value) < 1e10:
        # Model sizes are compared in millions up to here.
        return f"{value / 1e6:.0f}M"
    return "".join(_scale(value, COUNT_SCALES))


def format_flops(value: float) -> str:
    """Return a number of FLOPs with four digits, ``7.643 GFLOP``."""
    return " ".join(_scale(value, FLOP_SCALES)) + "FLOP"


def format_bytes(value: float) -> str:
    """Return a number of bytes with four digits, ``1.5 GiB``."""
    return " ".join(_scale(value, BYTE_SCALES))


def _scale(value: float, scales: tuple[tuple[float, str], ...]) -> tuple[str, str]:
    scale, unit = next((pair for pair in scales if abs(value) >= pair[0]), scales[-1])
    return f"{value / scale:.4g}", unit


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
    table.add_row("forward, all experts", format_flops(flops.forward))
    if flops.forward_deployed is not None:
        table.add_row("forward, deployed routing", format_flops(flops.forward_deployed))
    table.add_row("training", format_flops(flops.training))
    if flops.training_with_recomputation != flops.training:
        table.add_row("training with recomputation", format_flops(flops.training_with_recomputation))
    table.add_row("training, whole run", format_flops(flops.training * report.num_tokens))
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
