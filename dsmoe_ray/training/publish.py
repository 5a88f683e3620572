"""From the last checkpoint of a complete run to its published model and its plots; needs no Ray."""

from pathlib import Path
from typing import Any

import torch

from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.clock import unix_s
from dsmoe_ray.config_io import config_digest
from dsmoe_ray.data.prepared import PreparedData
from dsmoe_ray.data.tokenizer import load_tokenizer
from dsmoe_ray.errors import CheckpointError
from dsmoe_ray.training.checkpoint import read_model_tensors
from dsmoe_ray.training.checkpoint_store import find_newest_complete, read_manifest
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.metrics_log import read_rows
from dsmoe_ray.training.plots import draw_plots
from dsmoe_ray.training.run_directory import RunDirectory


def publish(config: TrainingRunConfig, directory: RunDirectory, prepared: PreparedData) -> None:
    """Publish the model of the newest checkpoint and draw the plots.

    Raises:
        CheckpointError: no checkpoint is whole.
    """
    search = find_newest_complete(directory.checkpoints)
    if search.path is None:
        raise CheckpointError(f"{directory.checkpoints} holds no whole checkpoint. {' '.join(search.refused)}")
    export_artifact(config, directory, checkpoint=search.path, prepared=prepared)
    draw_plots(directory)


def export_artifact(
    config: TrainingRunConfig, directory: RunDirectory, *, checkpoint: Path, prepared: PreparedData
) -> Path:
    """Publish the model in a checkpoint as the run's artifact, replacing an older one; return its path.

    Raises:
        CheckpointError: a file of the checkpoint is damaged.
    """
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    save_artifact(
        directory.artifact,
        model_config=config.model,
        tensors=read_model_tensors(checkpoint),
        tokenizer_json=prepared.tokenizer_path.read_text(encoding="utf-8"),
        provenance=describe_provenance(config, directory, step=read_manifest(checkpoint).step, prepared=prepared),
        eos_token_id=tokenizer.end_of_text_id,
    )
    return directory.artifact


def describe_provenance(
    config: TrainingRunConfig, directory: RunDirectory, *, step: int, prepared: PreparedData
) -> dict[str, Any]:
    """Return where a model comes from, as plain values."""
    evaluations = [event for event in read_rows(directory.events) if event["event"] == "evaluation"]
    rows = read_rows(directory.metrics)
    last = {key: evaluations[-1][key] for key in ("step", "loss_dense", "loss_sparse")} if evaluations else None
    return {
        "run": config.run.name,
        "step": step,
        "tokens": step * config.train.num_tokens_per_step,
        "config_digest": config_digest(config),
        "data_paths": config.data.paths,
        "train_tokens_available": prepared.num_train_tokens,
        "training_loss": rows[-1]["loss"] if rows else None,
        "held_out": last,
        "torch": torch.__version__,
        "created_unix_s": round(unix_s(), 3),
    }
