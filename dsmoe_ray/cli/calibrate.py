"""``dsmoe calibrate ARTIFACT --data PATH --budget B``: the routing that loses least for what it uses, stored."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dsmoe_ray import clock
from dsmoe_ray.artifact.calibration_record import CalibrationRecord
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.recalibrate import update_routing
from dsmoe_ray.artifact.save import check_target
from dsmoe_ray.cli.evaluate import check_seq_len, open_text
from dsmoe_ray.cli.validate import LOG_WIDTH
from dsmoe_ray.errors import UserError
from dsmoe_ray.evaluation.calibration import calibrate, check_budget, parse_method
from dsmoe_ray.evaluation.calibration_report import (
    PICTURE_FORMATS,
    draw_frontier,
    save_picture,
    to_record,
    to_table,
)
from dsmoe_ray.evaluation.quality import plan_windows
from dsmoe_ray.evaluation.rule_meter import StageCallback
from dsmoe_ray.inference.loading import load_model_to_measure
from dsmoe_ray.model.config import ModelConfig, MoeConfig

DEFAULT_MAX_TOKENS = 32768


ArtifactArgument = Annotated[Path, typer.Argument(help="Directory of a published model.", show_default=False)]
DataOption = Annotated[
    str, typer.Option(help="Text (file or directory), or prepared data such as RUN/data/held_out.", show_default=False)
]
BudgetOption = Annotated[
    float,
    typer.Option(
        help="Largest share of the FFN experts that a token may use, averaged over tokens and layers, from 1 / "
        "num_experts to 1. All experts are alike, so it is the share of the FFN's parameters and FLOPs as well; "
        "routers and attention, which runs as deployed, do not count.",
        show_default=False,
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        metavar="METHOD",
        help="per_layer_top_k: a number of experts for each layer, the same for every token. threshold: one threshold "
        "for all layers, so that tokens differ and the budget holds on average over the text. auto: the better one.",
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Publish the result here; by default ARTIFACT is replaced.", show_default=False)
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help=f"Picture of the frontier ({', '.join(PICTURE_FORMATS)}); by default DIRECTORY-calibration.png beside the "
        "directory that is written.",
        show_default=False,
    ),
]


def command(
    artifact: ArtifactArgument,
    data: DataOption,
    budget: BudgetOption,
    method: MethodOption = "auto",
    out: OutOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure and print only; the artifact stays.")] = False,
    max_tokens: Annotated[
        int, typer.Option(help="Read this many tokens, spread over the text; one half chooses, the other judges.")
    ] = DEFAULT_MAX_TOKENS,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of context; by default the model's longest sequence.")
    ] = None,
    plot: PlotOption = None,
    include: Annotated[str, typer.Option(help="Glob for the names of files in a directory of text.")] = "*",
    field: Annotated[str, typer.Option(help="JSONL key or parquet column that holds the text.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Find the routing of the FFN experts that loses least within a compute budget, and deploy it.

    Prints quality over active parameters for all experts, uniform top-k, tables of layers and thresholds, measured on
    a half of the text that had no part in the choice. The artifact keeps the choice and these figures; its weights are
    not written again.
    """
    start_s = clock.monotonic_s()
    published = load_artifact(artifact)
    config = published.model_config
    check_budget(budget, config)
    known_method = parse_method(method)
    picture = _check_places(artifact, out, plot, dry_run=dry_run)
    shards = open_text(published, data, include=include, field=field)
    windows = plan_windows(shards, seq_len=check_seq_len(seq_len, config.max_seq_len), max_tokens=max_tokens)
    model = load_model_to_measure(published)
    with _progress_bar() as on_progress:
        found = calibrate(model, shards, budget=budget, method=known_method, windows=windows, on_progress=on_progress)
    duration_s = clock.monotonic_s() - start_s
    record = to_record(found, shards, data=data, created_unix_s=clock.unix_s(), duration_s=duration_s)
    save_picture(draw_frontier(record), picture)
    stored = None
    if not dry_run:
        stored = update_routing(published, ffn=found.chosen.rule, calibration=record, target=out)
    _print(record, artifact=artifact, stored=stored, picture=picture, model=model.config, as_json=as_json)


def _check_places(artifact: Path, out: Path | None, plot: Path | None, *, dry_run: bool) -> Path:
    """Return where the picture goes; told before the measuring, which takes minutes.

    Raises:
        UserError: what is to be written cannot be.
    """
    if out is not None and dry_run:
        raise UserError("--out and --dry-run exclude each other: a dry run writes no artifact. Leave one out.")
    if out is not None:
        check_target(out)
    directory = (artifact if out is None else out).resolve()
    if plot is None:
        plot = directory.with_name(f"{directory.name}-calibration.png")
    if plot.suffix not in PICTURE_FORMATS:
        raise UserError(f"--plot {plot} must end in one of {', '.join(PICTURE_FORMATS)}; found {plot.suffix!r}")
    for path in (plot.resolve(), *([] if dry_run else [directory])):
        parent = next(parent for parent in path.parents if parent.exists())
        if not os.access(parent, os.W_OK):
            raise UserError(f"{path} cannot be written: {parent} is read-only. Give another --out or --plot.")
    return plot


def _print(
    record: CalibrationRecord,
    *,
    artifact: Path,
    stored: Path | None,
    picture: Path,
    model: ModelConfig,
    as_json: bool,
) -> None:
    if as_json:
        places = {"artifact": str(artifact), "stored_in": None if stored is None else str(stored), "plot": str(picture)}
        typer.echo(json.dumps({**places, **record.model_dump(mode="json")}, indent=2, allow_nan=False))
        return
    assert isinstance(model.ffn, MoeConfig)
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    console.print(to_table(record, num_experts=model.ffn.num_experts))
    typer.echo(f"\nchosen for a budget of {record.budget:g}: {record.routing} (was {record.deployed_before})")
    typer.echo(f"artifact: {'unchanged, as this was a dry run' if stored is None else stored}")
    typer.echo(f"picture:  {picture}")


@contextmanager
def _progress_bar() -> Iterator[StageCallback]:
    """Show a bar for each stage on a terminal's standard error, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=None)

        def on_progress(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total)

        yield on_progress
