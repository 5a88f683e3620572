"""Pictures of a run from its two JSONL files: loss over steps, and how even the routing is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dsmoe_ray.training.metrics_log import read_rows
from dsmoe_ray.training.run_directory import RunDirectory

_DPI = 120
_SMOOTH_SHARE = 50
"""The smoothed loss averages over this fraction of the steps."""


def draw_plots(directory: RunDirectory) -> list[Path]:
    """Draw ``loss.png`` and ``routing.png``, all at once each; return their paths."""
    rows = read_rows(directory.metrics)
    evaluations = _last_of_each_step(read_rows(directory.events))
    directory.plots.mkdir(exist_ok=True)
    figures = {"loss.png": draw_loss(rows, evaluations), "routing.png": draw_routing(rows, evaluations)}
    return [_save(figure, directory.plots / name) for name, figure in figures.items()]


def draw_loss(rows: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> Figure:
    """Draw training loss and held-out loss, with all experts and as deployed."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = _series(rows, "step"), _series(rows, "loss")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color="tab:blue", label="training")
    for key, label, color in (
        ("loss_dense", "held out, all experts", "tab:green"),
        ("loss_sparse", "held out, as deployed", "tab:orange"),
    ):
        if evaluations:
            axes.plot(_series(evaluations, "step"), _series(evaluations, key), "o-", label=label, color=color)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def draw_routing(rows: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> Figure:
    """Draw the balance of FFN experts over steps, and each expert's share of the deployed routing by layer."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    over_time, by_layer = figure.subplots(2, 1)
    over_time.plot(_series(rows, "step"), _series(rows, "balance"), color="tab:purple")
    over_time.set(xlabel="step", ylabel="largest over mean load", title="Balance of FFN experts (1 is even)")
    over_time.grid(alpha=0.3)
    shares = next((row["load_share"] for row in reversed(evaluations) if row.get("load_share")), None)
    if shares is None:
        by_layer.set_axis_off()
        by_layer.set_title("No evaluation was made; set train.eval_every to see each expert's load")
        return figure
    load_LE = np.array(shares, dtype=float)
    image = by_layer.imshow(load_LE * load_LE.shape[1], aspect="auto", cmap="viridis", vmin=0.0)
    for axis in (by_layer.xaxis, by_layer.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    by_layer.set(xlabel="expert", ylabel="layer", title="Load of each expert as deployed (1 is the mean)")
    figure.colorbar(image, ax=by_layer)
    return figure


def _last_of_each_step(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # A recovered run evaluates some steps twice, with the same result.
    found = {event["step"]: event for event in events if event["event"] == "evaluation"}
    return [found[step] for step in sorted(found)]


def _series(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    # A skipped step has no loss: null in the file, a gap in the line.
    return np.array([row[key] if row.get(key) is not None else np.nan for row in rows], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    width = max(1, len(values) // _SMOOTH_SHARE)
    padded = np.concatenate([np.full(width - 1, np.nan), values])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width) if len(values) else np.empty((0, 1))
    valid = np.isfinite(windows)
    counts = valid.sum(-1)
    means = np.where(valid, windows, 0.0).sum(-1) / np.maximum(counts, 1)
    return np.where(counts > 0, means, np.nan)


def _save(figure: Figure, path: Path) -> Path:
    replacement = path.with_name(f".{path.name}.new")
    with replacement.open("wb") as stream:
        # A bare Figure draws with Agg: no display, none of pyplot's global state.
        figure.savefig(stream, format="png", dpi=_DPI)
    return replacement.replace(path)
