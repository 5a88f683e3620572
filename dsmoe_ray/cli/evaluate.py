"""``dsmoe evaluate ARTIFACT --data PATH``: quality and cost of a published model under several routing settings."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dsmoe_ray.artifact.load import Artifact, load_artifact
from dsmoe_ray.cli.validate import LOG_WIDTH
from dsmoe_ray.data.packing import open_or_tokenize
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.data.tokenizer import parse_tokenizer
from dsmoe_ray.errors import UserError
from dsmoe_ray.evaluation.quality import ProgressCallback, measure_quality, plan_windows
from dsmoe_ray.evaluation.report import to_json, to_table
from dsmoe_ray.inference.loading import load_model_to_measure
from dsmoe_ray.inference.routing import DEPLOYED, ROUTING_HELP, name_routing, resolve_routing


def command(
    artifact: Annotated[Path, typer.Argument(help="Directory of a published model.", show_default=False)],
    data: Annotated[
        str,
        typer.Option(help="Text (file or directory), or prepared data such as RUN/data/held_out.", show_default=False),
    ],
    routing: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEC",
            help=f"{ROUTING_HELP} May be given many times; by default dense and deployed.",
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Evaluate this many tokens, spread over the text.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of context; by default the model's longest sequence.")
    ] = None,
    include: Annotated[str, typer.Option(help="Glob for the names of files in a directory of text.")] = "*",
    field: Annotated[str, typer.Option(help="JSONL key or parquet column that holds the text.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Measure loss, perplexity, active parameters and speed of a published model on some text.

    Windows of the text are read without regard to where documents end, also for a model trained with
    data.document_boundaries.
    """
    published = load_artifact(artifact)
    config = published.model_config
    settings = {name_routing(spec, config): resolve_routing(spec, config) for spec in routing or ("dense", DEPLOYED)}
    seq_len = check_seq_len(seq_len, config.max_seq_len)
    shards = open_text(published, data, include=include, field=field)
    windows = plan_windows(shards, seq_len=seq_len, max_tokens=max_tokens)
    model = load_model_to_measure(published)
    with _progress_bar() as on_progress:
        report = measure_quality(model, shards, settings, windows=windows, on_progress=on_progress)
    if as_json:
        typer.echo(json.dumps({"artifact": str(artifact), "data": data, **to_json(report)}, indent=2, allow_nan=False))
    else:
        Console(width=None if sys.stdout.isatty() else LOG_WIDTH).print(to_table(report))


def open_text(published: Artifact, data: str, *, include: str, field: str) -> TokenShards:
    """Return the tokens of a text, by the tokenizer of the artifact.

    Raises:
        UserError: there is no such text, or it was prepared with another tokenizer.
    """
    vocab_size = published.model_config.vocab_size
    source = f"the tokenizer of {published.directory}"
    tokenizer = parse_tokenizer(
        published.tokenizer_json, source=source, vocab_size=vocab_size, end_ids=published.eos_token_ids
    )
    return open_or_tokenize(data, tokenizer=tokenizer, vocab_size=vocab_size, include=include, field=field)


def check_seq_len(seq_len: int | None, max_seq_len: int) -> int:
    """Return the length of the windows: what was asked for, or the longest.

    Raises:
        UserError: the model takes no such sequences.
    """
    if seq_len is None:
        return max_seq_len
    if not 1 <= seq_len <= max_seq_len:
        raise UserError(
            f"--seq-len {seq_len} is not possible: this model takes sequences of 1 to {max_seq_len} tokens."
        )
    return seq_len


@contextmanager
def _progress_bar() -> Iterator[ProgressCallback]:
    """Show a bar on a terminal's standard error, and nothing elsewhere."""
    columns = (TextColumn("evaluating"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield on_progress
