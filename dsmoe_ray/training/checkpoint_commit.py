"""How a checkpoint comes to be, whole or not at all, and how old ones go.

Ranks write under ``.staging-step-00000100/``; when all have reported, one process writes the manifest there and renames
the directory. Whatever moment that process is killed at, a directory named ``step-*`` is complete, and
``prepare_checkpoints`` at the next start clears the rest away. Knows files and nothing of tensors.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsmoe_ray import clock
from dsmoe_ray.durable import (
    FileDigest,
    commit_directory,
    delete_directory,
    recover_directory,
    replaced_name,
    to_sealed_json,
    write_durably,
)
from dsmoe_ray.errors import CheckpointError
from dsmoe_ray.training.checkpoint_store import (
    FORMAT_VERSION,
    MANIFEST,
    CheckpointManifest,
    StoredFile,
    checkpoint_path,
    list_checkpoints,
    step_of,
)

logger = logging.getLogger(__name__)

_STAGING = ".staging-"
_DELETED = ".deleted-"


@dataclass(frozen=True)
class WrittenPart:
    """What one rank wrote into the staging directory; small and plain, to be sent to whoever commits."""

    rank: int
    files: dict[str, FileDigest]
    """By path relative to the checkpoint."""
    num_elements: int
    """Tensor elements in these files."""
    num_elements_total: int
    """Tensor elements that all ranks together must write."""
    values: dict[str, Any]
    """Plain numbers of the state, by dotted name."""


def staging_path(directory: Path, step: int) -> Path:
    """Return where the ranks write the checkpoint of a step before it is complete."""
    return directory / f"{_STAGING}{checkpoint_path(directory, step).name}"


def prepare_checkpoints(directory: Path) -> None:
    """Create the directory if need be and clear away what a killed process left: call at start and after a failure.

    Ranks that survived a failure close their writers first; a save that is cut off by this fails and harms nothing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in sorted(directory.iterdir()):
        replaced = replaced_name(path.name)
        if replaced is not None:
            recover_directory(directory / replaced)
    for path in sorted(directory.iterdir()):
        if path.name.startswith((_STAGING, _DELETED)):
            logger.info("removing unfinished %s", path)
            delete_directory(path)


def commit_checkpoint(
    directory: Path,
    *,
    step: int,
    parts: Sequence[WrittenPart],
    config_digest: str,
    mesh: Mapping[str, int],
    keep: int,
) -> Path:
    """Make the staged checkpoint of a step a complete one, then delete the oldest beyond ``keep``.

    One process calls it, once every rank's save has finished. A checkpoint of the same step is replaced.

    Args:
        directory: The run's checkpoints.
        step: As given to every rank.
        parts: One for each rank, in any order.
        config_digest: Of the configuration that the run trains with.
        mesh: Degree of each mesh axis.
        keep: How many checkpoints to keep, at least 1.

    Raises:
        CheckpointError: parts are missing or do not add up; nothing is committed.
    """
    staging, target = staging_path(directory, step), checkpoint_path(directory, step)
    _check_parts(staging, parts)
    files = {name: digest for part in parts for name, digest in part.files.items()}
    manifest = CheckpointManifest(
        format_version=FORMAT_VERSION,
        step=step,
        config_digest=config_digest,
        world_size=len(parts),
        mesh=dict(mesh),
        values=next(part.values for part in parts if part.rank == 0),
        created_unix_s=clock.unix_s(),
        files={name: StoredFile(**files[name]._asdict()) for name in sorted(files)},
    )
    _delete_strangers(staging, files)
    write_durably(staging / MANIFEST, to_sealed_json(manifest.model_dump()))
    commit_directory(staging, target)
    delete_old_checkpoints(directory, keep=keep)
    return target


def delete_old_checkpoints(directory: Path, *, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in list_checkpoints(directory)[: -max(keep, 1)]:
        # Hidden first: a kill in mid-delete must not leave a torn directory under a checkpoint's name.
        hidden = directory / f"{_DELETED}{path.name}"
        delete_directory(hidden)
        path.rename(hidden)
        delete_directory(hidden)


def set_aside_after(directory: Path, step: int) -> list[Path]:
    """Rename the checkpoints of later steps, so that a run that resumes from ``step`` is not mixed with another.

    They are kept under a name that is never resumed from; ``step=-1`` sets all aside.
    """
    moved = []
    for path in list_checkpoints(directory):
        if step_of(path) > step:
            names = (path.with_name(f"aside-{attempt}-{path.name}") for attempt in itertools.count())
            moved.append(path.rename(next(name for name in names if not name.exists())))
            logger.warning("checkpoint of a later step set aside as %s", moved[-1])
    return moved


def _check_parts(staging: Path, parts: Sequence[WrittenPart]) -> None:
    ranks = sorted(part.rank for part in parts)
    if not parts or ranks != list(range(len(parts))):
        raise CheckpointError(f"{staging.name}: parts of ranks 0..n-1 are needed to commit; found ranks {ranks}.")
    written, totals = sum(part.num_elements for part in parts), {part.num_elements_total for part in parts}
    if totals != {written}:
        raise CheckpointError(
            f"{staging.name}: the ranks wrote {written} tensor elements but hold {sorted(totals)}; "
            "a rank is missing, or ranks saved different states. The checkpoint is not committed."
        )
    for part in parts:
        for name, digest in part.files.items():
            _check_staged(staging / name, digest)


def _delete_strangers(staging: Path, files: Iterable[str]) -> None:
    """Remove what an earlier attempt left: the parts of a larger world, or a manifest."""
    expected = {Path(name).parts[0] for name in files}
    for path in staging.iterdir():
        if path.name not in expected:
            if path.is_dir():
                delete_directory(path)
            else:
                path.unlink()


def _check_staged(file: Path, digest: FileDigest) -> None:
    """Check that another rank's file is here at all: ranks may not share the file system they think they share."""
    size_bytes = file.stat().st_size if file.is_file() else None
    if size_bytes != digest.size_bytes:
        raise CheckpointError(
            f"{file} has {size_bytes} bytes here; its rank wrote {digest.size_bytes}. "
            "Set run.dir to a directory on a file system that every rank sees."
        )
