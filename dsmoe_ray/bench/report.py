"""The rows of a bench as a table for people and as JSON."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from dsmoe_ray.bench.measure import Row

_VERDICTS = {True: "met", False: "missed", None: ""}


def to_table(rows: Sequence[Row]) -> Table:
    """Return one line a row: figure with its spread, bar, both sides' speeds."""
    table = Table(box=None, pad_edge=False)
    for header in ("comparison", "median", "min - max", "bar", "", "ours", "baseline"):
        table.add_column(header, justify="left" if header in ("comparison", "") else "right")
    for row in rows:
        found = row.measurement
        bar = "" if row.bar is None else str(row.bar)
        if found is None:
            table.add_row(row.name, "-", "", bar, f"{row.status}: {row.reason}", "", "")
            continue
        figure = found.figure
        table.add_row(
            row.name,
            f"{figure.median:.2f}",
            f"{figure.min:.2f} - {figure.max:.2f}",
            bar,
            _VERDICTS[row.passed],
            _speed(found.ours),
            _speed(found.baseline),
        )
    return table


def to_json(rows: Sequence[Row], machine: dict[str, Any]) -> dict[str, Any]:
    """Return the whole report as plain values."""
    return {"machine": machine, "rows": [row.to_json() for row in rows]}


def _speed(side: dict[str, Any]) -> str:
    return f"{side['tokens_per_s']:,.0f} tok/s" if "tokens_per_s" in side else ""
