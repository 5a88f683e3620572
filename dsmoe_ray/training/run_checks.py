"""Whether a run can work, as far as its config and this machine's files tell. Loads no torch and starts nothing.

A config that contradicts itself never gets here: reading it fails already. What it made sure of is told all the same.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsmoe_ray.data.sources import expand_path
from dsmoe_ray.model.config import MoaConfig, MoeConfig
from dsmoe_ray.training.config import TrainingRunConfig

# A byte-level vocabulary has every byte and the token that ends a document.
SMALLEST_VOCABULARY = 257
# The process that starts a run reads these itself, so what it does not find there is missing for good.
_READ_AT_START = ("data", "tokenizer", "init_from")


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``warning``: may be otherwise on the training machines; ``failed``: cannot work."""

    name: str
    status: Literal["passed", "warning", "failed"]
    detail: str


def run_checks(config: TrainingRunConfig) -> list[Check]:
    """Look at mesh, batch, routing, schedule and files of a run."""
    checks: list[Callable[[TrainingRunConfig], Check | None]] = [
        _check_mesh,
        _check_experts,
        _check_batch,
        _check_routing,
        _check_chunks,
        _check_schedule,
        _check_data_paths,
        _check_tokenizer,
        _check_init_from,
    ]
    return [found for check in checks if (found := check(config)) is not None]


def find_obstacles(config: TrainingRunConfig) -> list[str]:
    """Return why a run cannot start from this process, which must see the files of the run."""
    return [
        check.detail
        for check in run_checks(config)
        if check.status == "failed" or (check.status == "warning" and check.name in _READ_AT_START)
    ]


def describe_deployed(config: TrainingRunConfig) -> str:
    """Return the routing of the published model in words, ``attention dense of 8, ffn top_k=6 of 32``."""
    parts = []
    for name, mixture in (("attention", config.model.attention), ("ffn", config.model.ffn)):
        if isinstance(mixture, MoaConfig | MoeConfig):
            parts.append(f"{name} {mixture.router.inference.to_spec()} of {mixture.num_experts}")
    return ", ".join(parts) or "no mixtures"


def _check_mesh(config: TrainingRunConfig) -> Check:
    parallel = config.parallel
    detail = f"dp_replicate {parallel.dp_replicate} x dp_shard {parallel.dp_shard} x ep {parallel.ep}"
    return Check("mesh", "passed", f"{detail} = {parallel.world_size} ranks")


def _check_experts(config: TrainingRunConfig) -> Check | None:
    if not isinstance(config.model.ffn, MoeConfig):
        return None
    num_experts, ep = config.model.ffn.num_experts, config.parallel.ep
    return Check("experts", "passed", f"{num_experts} a layer, {num_experts // ep} run on each rank")


def _check_batch(config: TrainingRunConfig) -> Check:
    num_sequences, num_ranks = config.sequences_per_micro_step, config.parallel.world_size
    parts = f"{num_ranks} ranks x {config.sequences_per_rank // num_sequences} micro-steps x {num_sequences} sequences"
    return Check("batch", "passed", f"{config.train.num_tokens_per_step} tokens = {parts} x {config.train.seq_len}")


def _check_routing(config: TrainingRunConfig) -> Check:
    train = config.train
    trained = f"trained attention {train.routing_attention.mode}, ffn {train.routing_ffn.mode}"
    for name, routing in (("routing_ffn", train.routing_ffn), ("routing_attention", train.routing_attention)):
        if routing.end_step is not None and routing.end_step > train.steps:
            detail = (
                f"train.{name}.end_step={routing.end_step} lies beyond train.steps={train.steps}; top_k is not reached"
            )
            return Check("routing", "warning", detail)
    return Check("routing", "passed", f"{trained}; deployed {describe_deployed(config)}")


def _check_chunks(config: TrainingRunConfig) -> Check | None:
    tokens, chunks = config.sequences_per_micro_step * config.train.seq_len, config.parallel.exchange_chunks
    if tokens >= chunks:
        return None
    detail = f"parallel.exchange_chunks={chunks} exceeds the {tokens} tokens of a micro-step; lower it"
    return Check("exchange", "failed", detail)


def _check_schedule(config: TrainingRunConfig) -> Check:
    schedule, steps = config.train.lr_schedule, config.train.steps
    ramps = schedule.warmup_steps + (schedule.decay_steps or 0)
    detail = f"{schedule.kind}, warm-up {schedule.warmup_steps} of {steps} steps"
    if ramps > steps:
        return Check("schedule", "warning", f"{detail}: warm-up and decay exceed the run; the peak is not held")
    return Check("schedule", "passed", detail)


def _check_data_paths(config: TrainingRunConfig) -> Check:
    paths = config.data.paths
    missing = [path for path in paths if not os.path.exists(expand_path(path))]
    if missing:
        detail = f"not found from here: {', '.join(missing)}; training needs data.paths to exist on its machines"
        return Check("data", "warning", detail)
    return Check("data", "passed", f"{len(paths)} path(s) of {config.data.format}")


def _check_tokenizer(config: TrainingRunConfig) -> Check:
    vocab_size, path = config.model.vocab_size, config.data.tokenizer
    if path is None:
        return _check_default_tokenizer(vocab_size, config.model.init_from)
    if not os.path.isfile(expand_path(path)):
        detail = f"data.tokenizer={path} is not a file here; training needs a tokenizer.json there"
        return Check("tokenizer", "warning", detail)
    try:
        size = _read_vocabulary_size(expand_path(path))
    except (ValueError, KeyError, TypeError, OSError) as error:
        detail = f"data.tokenizer={path} cannot be read as a tokenizer.json ({type(error).__name__}: {error})"
        return Check("tokenizer", "failed", detail)
    if size > vocab_size:
        detail = f"{path} has token ids up to {size - 1}; raise model.vocab_size from {vocab_size} to {size} or more"
        return Check("tokenizer", "failed", detail)
    return Check("tokenizer", "passed", f"{path}: {size} tokens in a vocabulary of {vocab_size}")


def _check_default_tokenizer(vocab_size: int, init_from: str | None) -> Check:
    if init_from is not None:
        return Check("tokenizer", "passed", f"that of {init_from}")
    if vocab_size < SMALLEST_VOCABULARY:
        detail = f"model.vocab_size={vocab_size} is too small for bytes; use at least {SMALLEST_VOCABULARY}"
        return Check("tokenizer", "failed", detail)
    return Check("tokenizer", "passed", f"byte-level BPE of {vocab_size} tokens, trained on the data")


def _read_vocabulary_size(path: Path) -> int:
    """Return the largest token id plus one; read as JSON, since the tokenizer's library loads slowly."""
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return max([*ids, *(token["id"] for token in content.get("added_tokens", []))]) + 1


def _check_init_from(config: TrainingRunConfig) -> Check | None:
    path = config.model.init_from
    if path is None:
        return None
    if not os.path.isfile(os.path.join(os.path.expanduser(path), "manifest.json")):
        return Check("init_from", "warning", f"model.init_from={path} is not an artifact here; training needs it")
    return Check("init_from", "passed", path)
