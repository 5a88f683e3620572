"""``dsmoe inspect ARTIFACT``: what a published model is, where it comes from, and whether it is whole."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dsmoe_ray import clock
from dsmoe_ray.artifact.manifest import ArtifactManifest, read_manifest, read_model_config
from dsmoe_ray.cli.validate import LOG_WIDTH, format_bytes, format_count
from dsmoe_ray.model.accounting import count_parameters
from dsmoe_ray.model.config import ModelConfig, RoutingConfig

PARTS = ("embedding", "head", "attention", "ffn", "routers", "norms", "non_embedding", "total")


def command(
    artifact: Annotated[Path, typer.Argument(help="Directory of the artifact.", show_default=False)],
    verify: Annotated[bool, typer.Option("--verify", help="Read all weights and check their digests.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Describe an artifact: shapes, parameters, routing, provenance, files. Weights are read with --verify only."""
    manifest = read_manifest(artifact)
    config = read_model_config(artifact, manifest)
    description = describe(artifact, manifest, config)
    if verify:
        description["verified"] = _verify(artifact)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        _print(description, Console(width=None if sys.stdout.isatty() else LOG_WIDTH))


def describe(directory: Path, manifest: ArtifactManifest, config: ModelConfig) -> dict[str, Any]:
    """Return everything that can be told without reading weights, as plain values."""
    counts = count_parameters(config)
    sizes = {name: file.size_bytes for name, file in manifest.side_files.items()}
    sizes |= {name: file.size_bytes for name, file in manifest.weight_files.items()}
    return {
        "directory": str(directory),
        "format_version": manifest.format_version,
        "model": config.model_dump(mode="json"),
        "parameters": {name: getattr(counts, name) for name in PARTS},
        "routing": manifest.routing,
        "calibration": None if manifest.calibration is None else manifest.calibration.model_dump(mode="json"),
        "provenance": manifest.provenance,
        "num_tensors": len(manifest.tensors),
        "dtypes": dict(Counter(tensor.dtype for tensor in manifest.tensors.values())),
        "files": sizes,
        "size_bytes": sum(sizes.values()),
        "verified": None,
    }


def _verify(directory: Path) -> dict[str, Any]:
    # Only this needs torch; a description answers without it.
    from dsmoe_ray.artifact.load import load_artifact

    start_s = clock.monotonic_s()
    artifact = load_artifact(directory)
    artifact.verify()
    duration_s = clock.monotonic_s() - start_s
    return {"size_bytes": artifact.size_bytes, "duration_s": duration_s}


def _print(description: dict[str, Any], console: Console) -> None:
    model = description["model"]
    head = f"{description['directory']}: {model['num_layers']} layers, d_model {model['d_model']}, "
    head += f"vocabulary {model['vocab_size']}, up to {model['max_seq_len']} tokens"
    console.print(Text(head, style="bold"))
    tables: list[Table | Group] = [_parts(model), _parameters(description), _provenance(description)]
    tables += [] if description["calibration"] is None else [_calibration(description["calibration"])]
    tables.append(_files(description))
    console.print(Group(*(part for table in tables for part in ("", table))))
    verified = description["verified"]
    if verified is None:
        console.print("\nweights not read; --verify checks their digests")
    else:
        rate = verified["size_bytes"] / verified["duration_s"] / 1e6
        console.print(f"\nall {description['num_tensors']} tensors match their digests ({rate:.0f} MB/s)")


def _parts(model: dict[str, Any]) -> Table:
    table = _new_table("part", "kind", "shape", "router", "deployed routing")
    for name in ("attention", "ffn"):
        settings = model[name]
        router = settings.get("router")
        shape = {key: value for key, value in settings.items() if key not in ("kind", "router")}
        cells = (settings["kind"], _to_text(shape), "", "")
        if router is not None:
            kept = {key: value for key, value in router.items() if key not in ("inference",) and value is not None}
            inference = RoutingConfig.model_validate(router["inference"]).to_spec()
            cells = (settings["kind"], _to_text(shape), _to_text(kept), inference)
        table.add_row(name, *map(Text, cells))
    return table


def _parameters(description: dict[str, Any]) -> Table:
    table = _new_table("parameters", "total", right=True)
    for name, count in description["parameters"].items():
        table.add_row(name.replace("_", "-"), format_count(count))
    return table


def _provenance(description: dict[str, Any]) -> Table:
    table = _new_table("provenance", "")
    for name, value in description["provenance"].items():
        table.add_row(Text(name), Text(str(value)))
    return table


def _calibration(calibration: dict[str, Any]) -> Group:
    num_tokens = calibration["num_held_out_tokens"]
    title = f"calibration for a budget of {calibration['budget']:g} on {calibration['data']}: {calibration['routing']}"
    table = _new_table("routing of the FFN", "active FFN", f"loss on {num_tokens:,} tokens", right=True)
    for point in calibration["frontier"]:
        is_chosen = point["routing"] == calibration["routing"]
        cells = (f"{point['active_ffn_ratio']:.1%}", f"{point['loss']:.4f}")
        table.add_row(Text(point["routing"]), *cells, style="bold" if is_chosen else None)
    return Group(Text(title), table)


def _files(description: dict[str, Any]) -> Table:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in description["dtypes"].items())
    table = _new_table(f"files ({description['num_tensors']} tensors: {dtypes})", "size", right=True)
    for name, size_bytes in description["files"].items():
        table.add_row(Text(name), format_bytes(size_bytes))
    table.add_row("total", format_bytes(description["size_bytes"]))
    return table


def _to_text(fields: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in fields.items())


def _new_table(*headers: str, right: bool = False) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(header, justify="right" if right and index else "left")
    return table
