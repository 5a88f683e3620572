"""``dsmoe import HF_DIR OUT``: a model in a stock format of Hugging Face as an artifact that our engine runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dsmoe_ray import clock
from dsmoe_ray.artifact.hugging_face.import_model import import_model, open_model
from dsmoe_ray.artifact.save import check_target
from dsmoe_ray.data.tokenizer import parse_tokenizer


def command(
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="Local directory of the model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Artifact to write; new or empty.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Read a jetmoe, granitemoe, mixtral or qwen2_moe model: weights, tokenizer, chat template, defaults.

    Nothing of the model is run, and pickled weights are refused. What our layers do not compute is refused too.
    """
    check_target(out)
    opened = open_model(hf_dir)
    config = opened.plan.model_config
    parse_tokenizer(
        opened.tokenizer_json,
        source=str(hf_dir / "tokenizer.json"),
        vocab_size=config.vocab_size,
        end_ids=opened.eos_token_ids,
    )
    provenance = {
        "imported_from": opened.plan.kind.value,
        "source": hf_dir.resolve().name,
        "folded": opened.plan.folded,
        "created_unix_s": round(clock.unix_s(), 3),
    }
    manifest = import_model(opened, out, provenance=provenance)
    report = {
        "format": opened.plan.kind.value,
        "directory": str(out),
        "folded": opened.plan.folded,
        "routing": manifest.routing,
        "num_tensors": len(manifest.tensors),
        "has_chat_template": opened.chat_template is not None,
        "size_bytes": sum(file.size_bytes for file in manifest.weight_files.values()),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(f"{out}: {report['num_tensors']} tensors of a {report['format']} model")
    for sentence in opened.plan.folded:
        typer.echo(f"folded: {sentence}")
