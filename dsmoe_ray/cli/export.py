"""``dsmoe export ARTIFACT OUT --format F``: a published model in a stock format of Hugging Face."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from dsmoe_ray.artifact.hugging_face.export import MAX_FILE_BYTES, export_model
from dsmoe_ray.artifact.hugging_face.export_plan import plan_export
from dsmoe_ray.artifact.hugging_face.formats import Format
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import check_target
from dsmoe_ray.cli.validate import format_bytes
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.model.config import RoutingConfig, RoutingMode


class Dtype(StrEnum):
    """Types of exported weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


_TORCH_DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.BFLOAT16: torch.bfloat16}


def command(
    artifact: Annotated[Path, typer.Argument(help="Directory of a published model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Directory to write; new or empty.", show_default=False)],
    kind: Annotated[Format, typer.Option("--format", help="Model type to write.", show_default=False)],
    routing: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="top_k=K or dense: experts per token of the exported model. By default as the FFN is deployed.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the weights; by default as in the artifact.", show_default=False)
    ] = None,
    max_file_bytes: Annotated[
        int, typer.Option(min=1, help="A weights file is closed before it exceeds this; held in memory until then.")
    ] = MAX_FILE_BYTES,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Write a model so that stock tools load it without code of ours; refused where numbers would change.

    The weights compute the same function. Where the format cannot run the routing that the artifact deploys, what it
    runs instead is told.
    """
    check_target(out)
    published = load_artifact(artifact)
    plan = plan_export(published.model_config, kind, routing=_parse_routing(routing))
    written = export_model(
        published,
        out,
        plan,
        dtype=None if dtype is None else _TORCH_DTYPES[dtype],
        max_file_bytes=max_file_bytes,
    )
    report = {
        "format": kind.value,
        "directory": str(written.directory),
        "top_k": plan.top_k,
        "routing_changes": plan.routing_changes,
        "dtype": str(written.dtype).removeprefix("torch."),
        "files": written.files,
        "size_bytes": sum(written.files.values()),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(report)


def _parse_routing(spec: str | None) -> RoutingConfig | None:
    if spec is None:
        return None
    rule = RoutingConfig.parse(spec)
    if rule.mode not in (RoutingMode.DENSE, RoutingMode.TOP_K):
        raise ConfigError(f"--routing {spec}: the formats run dense or top_k=K only. Give one of these.")
    return rule


def _print(report: dict[str, Any]) -> None:
    size = format_bytes(report["size_bytes"])
    typer.echo(f"{report['directory']}: {report['format']}, {report['dtype']}, top_k={report['top_k']}, {size}")
    for change in report["routing_changes"]:
        typer.echo(f"routing changes: {change}")
