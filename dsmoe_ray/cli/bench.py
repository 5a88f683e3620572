"""``dsmoe bench train``, ``infer`` and ``serve``: measured ratios against named baselines, side by side in one run."""

import contextlib
import json
import sys
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from dsmoe_ray.bench import infer, serve, train
from dsmoe_ray.bench.comparisons import measure_all
from dsmoe_ray.bench.peer_process import parse_peer
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.ray_environment import prepare_local_ray, prepare_local_serving


class Subject(StrEnum):
    """What is measured."""

    TRAIN = "train"
    INFER = "infer"
    SERVE = "serve"


_BENCHES = {Subject.TRAIN: train, Subject.INFER: infer, Subject.SERVE: serve}


class Device(StrEnum):
    """Where it is measured."""

    CPU = "cpu"
    CUDA = "cuda"


def command(
    subject: Annotated[Subject, typer.Argument(help="What to measure.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only comparisons whose name begins so; repeatable.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of turns in each comparison.")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="A look, not a measurement: fewer and shorter turns.")] = False,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.CPU,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COMMAND",
            help="Another engine and how to start it: transformers, llama_cpp or vllm for infer, vllm_server for "
            "serve; repeatable.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Compute threads in total, on a CPU.")] = 2,
) -> None:
    """Measure training, the engine or serving against baselines, side by side; a bar that is missed is no error."""
    settings = Settings(
        device=device.value,
        num_threads=threads,
        num_pairs=pairs,
        quick=quick,
        peers=dict(parse_peer(spec) for spec in peer or ()),
    )
    comparisons = _BENCHES[subject].choose_comparisons(only or (), settings)
    (prepare_local_serving if subject is Subject.SERVE else prepare_local_ray)()
    import torch

    from dsmoe_ray.bench.machine import describe_machine
    from dsmoe_ray.bench.report import to_json, to_table

    if device is Device.CUDA and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    torch.set_num_threads(threads)
    machine = describe_machine(settings)
    notes = Console(stderr=True)
    rows = []
    # Ray tells of a killed shard on standard output, which is for the report alone.
    with contextlib.redirect_stdout(sys.stderr):
        for row in measure_all(comparisons, settings):
            rows.append(row)
            notes.print(f"{row.name}: {row.status} in {row.duration_s:.0f} s", highlight=False)
    if as_json:
        typer.echo(json.dumps(to_json(rows, machine)))
        return
    console = Console(width=None if notes.is_terminal else 160)
    console.print(f"{machine['cpu']}, {threads} threads, torch {machine['torch']}", highlight=False)
    console.print(to_table(rows))
