"""A calibration as the record that an artifact keeps, as a table and as a picture. Measures nothing."""

import hashlib
import math
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from dsmoe_ray.artifact.calibration_record import CalibrationRecord, FrontierPoint
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.evaluation.calibration import Calibration
from dsmoe_ray.evaluation.quality import Windows
from dsmoe_ray.model.config import RoutingConfig, RoutingMode

PICTURE_FORMATS = (".png", ".svg", ".pdf")
_DPI = 120
_LEAST_LOSS = 1e-4
"""A logarithmic axis has no zero, and less than this is chance."""
_LINES = {
    RoutingMode.TOP_K: ("uniform top-k", "s-", "tab:gray"),
    RoutingMode.PER_LAYER_TOP_K: ("table of layers", "o-", "tab:blue"),
    RoutingMode.THRESHOLD: ("threshold", "^-", "tab:orange"),
}


def digest_windows(shards: TokenShards, *halves: Windows) -> str:
    """Return the SHA-256 of the tokens of all windows in the order of the text, as little-endian 32-bit numbers."""
    digest = hashlib.sha256()
    for index in sorted(index for half in halves for index in half.indices):
        digest.update(shards.read_sample(index, halves[0].seq_len).tokens.astype("<u4").tobytes())
    return digest.hexdigest()


def to_record(
    calibration: Calibration, shards: TokenShards, *, data: str, created_unix_s: float, duration_s: float
) -> CalibrationRecord:
    """Return what the artifact keeps of a calibration."""
    selection, held_out = calibration.selection, calibration.held_out
    return CalibrationRecord(
        budget=calibration.budget,
        method=calibration.method,
        routing=calibration.chosen.rule.to_spec(),
        deployed_before=calibration.deployed_before.to_spec(),
        data=data,
        data_sha256=digest_windows(shards, selection, held_out),
        seq_len=selection.seq_len,
        num_selection_tokens=selection.num_tokens,
        num_held_out_tokens=held_out.num_tokens,
        created_unix_s=round(created_unix_s, 3),
        duration_s=round(duration_s, 3),
        frontier=[
            FrontierPoint(
                routing=row.rule.to_spec(),
                active_ffn_ratio=min(row.held_out.active_ffn_ratio, 1.0),
                loss=row.held_out.loss,
                selection_active_ffn_ratio=min(row.selection.active_ffn_ratio, 1.0),
                selection_loss=row.selection.loss,
            )
            for row in calibration.frontier
        ],
        profile=calibration.profile,
    )


def to_table(record: CalibrationRecord, *, num_experts: int) -> Table:
    """Return the frontier, one row for each routing."""
    title = (
        f"perplexity on the {record.num_held_out_tokens:,} tokens that chose nothing, and on the "
        f"{record.num_selection_tokens:,} that the choice was made on"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("routing of the FFN")
    for header in ("experts", "active FFN", "perplexity", "vs all", "(choice: active", "vs all)"):
        table.add_column(header, justify="right")
    table.add_column("")
    dense = find_dense(record)
    for point in record.frontier:
        notes = {"chosen": record.routing, "deployed before": record.deployed_before}
        table.add_row(
            Text(point.routing),
            f"{point.active_ffn_ratio * num_experts:.2f}",
            f"{point.active_ffn_ratio:.1%}",
            f"{math.exp(point.loss):.3f}",
            f"{math.expm1(point.loss - dense.loss):+.2%}",
            f"{point.selection_active_ffn_ratio:.1%}",
            f"{math.expm1(point.selection_loss - dense.selection_loss):+.2%}",
            Text(", ".join(note for note, routing in notes.items() if routing == point.routing)),
        )
    return table


def draw_frontier(record: CalibrationRecord) -> Figure:
    """Draw what is lost against all experts over the share of FFN experts in use, by kind of routing."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    points = [(RoutingConfig.parse(point.routing).mode, point) for point in record.frontier]
    dense = find_dense(record)
    for mode, (label, style, color) in _LINES.items():
        # Every line ends at all experts, which all kinds of routing have in common.
        line = [point for found, point in points if found in (mode, RoutingMode.DENSE)]
        axes.plot(*_coordinates(line, dense), style, color=color, label=label, markersize=4, linewidth=1.2)
    chosen = [point for point in record.frontier if point.routing == record.routing]
    axes.plot(*_coordinates(chosen, dense), "*", color="tab:red", markersize=14, label=f"chosen: {record.routing}")
    axes.axvline(record.budget, color="tab:red", linestyle=":", linewidth=1, label=f"budget {record.budget:g}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.3g}")
    axes.set_yscale("log")
    axes.set(
        xlabel="share of FFN experts in use", ylabel=f"loss above all experts (nats, {_LEAST_LOSS:g} and less as one)"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def find_dense(record: CalibrationRecord) -> FrontierPoint:
    """Return the point with all experts, which every frontier has."""
    return next(point for point in record.frontier if point.routing == "dense")


def save_picture(figure: Figure, path: Path) -> None:
    """Write a figure in the format of its file's name, all at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replacement = path.with_name(f".{path.name}.new")
    with replacement.open("wb") as stream:
        figure.savefig(stream, format=path.suffix.removeprefix("."), dpi=_DPI)
    replacement.replace(path)


def _coordinates(points: list[FrontierPoint], dense: FrontierPoint) -> tuple[list[float], list[float]]:
    ordered = sorted(points, key=lambda point: point.active_ffn_ratio)
    return (
        [point.active_ffn_ratio for point in ordered],
        [max(point.loss - dense.loss, _LEAST_LOSS) for point in ordered],
    )
