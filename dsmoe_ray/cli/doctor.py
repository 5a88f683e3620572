"""``dsmoe doctor``: look at this machine and say what is missing."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsmoe_ray.operations.doctor import Finding, examine_machine


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check this machine: versions, cores, memory, GPU, ports. Exit code 1 if something will not work."""
    findings = examine_machine(Path.cwd())
    failed = any(finding.status == "failure" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        Console().print(_to_table(findings))
    raise typer.Exit(int(failed))


def _to_table(findings: list[Finding]) -> Table:
    colors = {"ok": "green", "warning": "yellow", "failure": "red"}
    table = Table("what", "status", "found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        # Text, not strings: rich would take the brackets of "ray[default]" for markup.
        status = Text(finding.status, style=colors[finding.status])
        table.add_row(finding.name, status, Text(finding.found), Text(finding.advice))
    return table
