"""Where a run starts: from nothing, from its newest whole checkpoint, or from one that was named.

Looks first and changes nothing; ``apply_resume`` then moves aside what must not be mixed with the new run. Nothing that
cannot be made again is ever deleted.
"""

import itertools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsmoe_ray.errors import CheckpointError, ConfigError
from dsmoe_ray.training.checkpoint_commit import prepare_checkpoints, set_aside_after
from dsmoe_ray.training.checkpoint_store import find_newest_complete, list_checkpoints, verify_checkpoint
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.metrics_log import MetricsLog, last_step
from dsmoe_ray.training.run_directory import RunDirectory

# Prepared data is not the old run's alone; hidden files are locks and probes.
_NOT_MOVED = ("data", "previous-")
_MAY_CHANGE = (("init_from",), ("attention", "router", "inference"), ("ffn", "router", "inference"))
_ORDER_KEYS = (("run", "seed"), ("train", "seq_len"), ("train", "num_tokens_per_step"))


@dataclass(frozen=True)
class ResumePlan:
    """How a run begins."""

    checkpoint: Path | None
    """Where its state comes from; None starts from the seed or from ``model.init_from``."""
    step: int
    """Steps already done."""
    archive: bool = False
    """Move what an earlier run left out of the way."""
    copy_rows: bool = False
    """Keep a copy of the rows of later steps, which may not come out the same again."""
    notes: tuple[str, ...] = ()
    """What a person should know."""


def plan_resume(directory: RunDirectory, config: TrainingRunConfig, resume: str) -> ResumePlan:
    """Decide where to start.

    Args:
        directory: The run's.
        config: What the run was asked to be.
        resume: ``auto``, ``never``, or the path of a checkpoint.

    Raises:
        CheckpointError: the named checkpoint is damaged, or all are.
        ConfigError: the configuration does not continue the run that the checkpoint is of.
    """
    if resume == "never":
        return ResumePlan(None, 0, archive=has_run(directory))
    if resume != "auto":
        return _plan_from(directory, Path(resume).expanduser().absolute())
    search = find_newest_complete(directory.checkpoints)
    if search.path is None or search.manifest is None:
        if search.refused:
            raise CheckpointError(
                "every checkpoint of this run is damaged:\n  "
                + "\n  ".join(search.refused)
                + "\nStart over with --resume never; what is there is moved aside, not deleted."
            )
        return ResumePlan(None, 0)
    check_continues(directory, config)
    return ResumePlan(search.path, search.manifest.step, notes=tuple(f"refused: {reason}" for reason in search.refused))


def apply_resume(directory: RunDirectory, plan: ResumePlan) -> None:
    """Make the run directory fit the plan."""
    if plan.archive:
        _move_aside(directory)
    log = MetricsLog(directory.metrics)
    if plan.copy_rows and log.step > plan.step:
        shutil.copyfile(directory.metrics, directory.root / f"metrics-until-{log.step}.jsonl")
    prepare_checkpoints(directory.checkpoints)
    set_aside_after(directory.checkpoints, plan.step if _is_own(directory, plan.checkpoint) else -1)
    log.keep_until(plan.step)


def has_run(directory: RunDirectory) -> bool:
    """Return whether an earlier run left something here that a new one would mix with."""
    return last_step(directory.metrics) > 0 or bool(list_checkpoints(directory.checkpoints))


def check_continues(directory: RunDirectory, config: TrainingRunConfig) -> None:
    """Refuse a configuration with which the saved state would be wrong or the data order broken.

    Raises:
        ConfigError: names the keys that changed.
    """
    if not directory.config.exists():
        return
    saved = _read_saved_config(directory)
    new = config.model_dump(mode="json")
    changed = [f"model.{line}" for line in _differences(_shape(saved.get("model")), _shape(new["model"]))]
    if changed:
        raise ConfigError(
            f"{directory.root} holds a run of another model: {'; '.join(changed)}. "
            "Set run.dir to another directory, undo the change, or start over with --resume never."
        )
    moved = [f"{a}.{b}: {saved[a].get(b)} -> {new[a][b]}" for a, b in _ORDER_KEYS if saved[a].get(b) != new[a][b]]
    if moved:
        raise ConfigError(
            f"{directory.root} holds a run with another order of samples: {'; '.join(moved)}. Going on would skip or "
            "repeat some. Undo the change, or name the checkpoint (--resume DIR) if that is meant."
        )


def _read_saved_config(directory: RunDirectory) -> dict[str, Any]:
    try:
        saved = yaml.safe_load(directory.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        saved = None
    sections = {section for section, _ in _ORDER_KEYS}
    if not (isinstance(saved, dict) and all(isinstance(saved.get(section), dict) for section in sections)):
        raise ConfigError(
            f"{directory.config} is damaged, so nobody can tell whether this config continues that run. Restore the "
            "file; or delete it, if you know that model, seed and batch are those of the run."
        )
    return saved


def _plan_from(directory: RunDirectory, path: Path) -> ResumePlan:
    if not path.is_dir():
        raise CheckpointError(
            f"--resume {path}: there is no such checkpoint; give 'auto', 'never' or a step-* directory."
        )
    manifest = verify_checkpoint(path)
    if _is_own(directory, path):
        return ResumePlan(path, manifest.step, copy_rows=True)
    return ResumePlan(path, manifest.step, archive=has_run(directory))


def _is_own(directory: RunDirectory, checkpoint: Path | None) -> bool:
    return checkpoint is not None and checkpoint.resolve().parent == directory.checkpoints.resolve()


def _move_aside(directory: RunDirectory) -> None:
    names = (directory.root / f"previous-{number}" for number in itertools.count(1))
    target = next(name for name in names if not name.exists())
    target.mkdir()
    for path in sorted(directory.root.iterdir()):
        if not path.name.startswith((".", *_NOT_MOVED)):
            path.rename(target / path.name)


def _shape(model: Any) -> dict[str, Any]:
    """Return the model section without what may change from one start to the next."""
    flat = dict(_flatten(model if isinstance(model, Mapping) else {}))
    return {".".join(key): value for key, value in flat.items() if not any(key[: len(p)] == p for p in _MAY_CHANGE)}


def _flatten(section: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    leaves: list[tuple[tuple[str, ...], Any]] = []
    for key, value in section.items():
        leaves += _flatten(value, (*prefix, key)) if isinstance(value, Mapping) else [((*prefix, key), value)]
    return leaves


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]
