"""The directory of checkpoints as a reader sees it: which are there, whether they are whole, which to resume from.

Knows files and digests and nothing of tensors. ``step-00000100/`` holds ``manifest.json`` and one ``rank-00000/`` for
each rank that saved. ``checkpoint_commit.py`` writes it.
"""

import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from dsmoe_ray.config_io import Config
from dsmoe_ray.durable import digest_file, from_sealed_json
from dsmoe_ray.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_STEP_NAME = re.compile(r"step-(\d{8,})")
_DIGEST_THREADS = 4


class StoredFile(Config):
    """One file of a checkpoint."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: NonNegativeInt


class CheckpointManifest(Config):
    """What a checkpoint holds; written last, so a directory without one is torn."""

    format_version: Literal[1]
    step: NonNegativeInt
    config_digest: str
    world_size: PositiveInt
    mesh: dict[str, int]
    """Degree of each mesh axis it was saved on; it may be loaded on any other."""
    values: dict[str, Any]
    """Plain numbers of the state by dotted name, the position in the data among them."""
    created_unix_s: float
    files: Annotated[dict[str, StoredFile], Field(min_length=1)]


@dataclass(frozen=True)
class CheckpointSearch:
    """The checkpoint to resume from, if any, and why newer ones were refused."""

    path: Path | None
    manifest: CheckpointManifest | None
    refused: tuple[str, ...]


def checkpoint_path(directory: Path, step: int) -> Path:
    """Return where the complete checkpoint of a step lies."""
    return directory / f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint directories, oldest first; they are complete unless damaged since."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if _STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint directory's name."""
    match = _STEP_NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint; its name must be like step-00000100.")
    return int(match.group(1))


def find_newest_complete(directory: Path) -> CheckpointSearch:
    """Return the newest checkpoint whose every file matches its digest; damaged ones are named and passed over."""
    refused: list[str] = []
    for path in reversed(list_checkpoints(directory)):
        try:
            manifest = verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("checkpoint refused: %s", error)
            refused.append(str(error))
        else:
            return CheckpointSearch(path, manifest, tuple(refused))
    return CheckpointSearch(None, None, tuple(refused))


def verify_checkpoint(path: Path) -> CheckpointManifest:
    """Check every file of a checkpoint against its digest and return its manifest.

    Raises:
        CheckpointError: a file is missing, shortened or changed; names it.
    """
    manifest = read_manifest(path)
    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        for check in [pool.submit(verify_file, path, name, file) for name, file in manifest.files.items()]:
            check.result()
    return manifest


def read_manifest(path: Path) -> CheckpointManifest:
    """Read and check the manifest of a checkpoint; the files it lists are not looked at."""
    try:
        fields = from_sealed_json((path / MANIFEST).read_bytes())
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r} is unknown to this release, which reads {FORMAT_VERSION}")
        manifest = CheckpointManifest.model_validate(fields, strict=True)
        for name in manifest.files:
            _check_inside(name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path / MANIFEST} is missing. {_ADVICE}") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path / MANIFEST} is damaged: {where}: {first['msg']}. {_ADVICE}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error}. {_ADVICE}") from error
    return manifest


def verify_file(path: Path, name: str, expected: StoredFile) -> None:
    """Raise ``CheckpointError`` unless one file of a checkpoint is what the manifest says."""
    file = path / name
    try:
        # The size is told first: a shortened file is the common damage, and seeing it costs nothing.
        size_bytes = file.stat().st_size
        if size_bytes != expected.size_bytes:
            raise CheckpointError(f"{file} has {size_bytes} bytes; {expected.size_bytes} were written. {_ADVICE}")
        sha256 = digest_file(file).sha256
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}. {_ADVICE}") from error
    if sha256 != expected.sha256:
        raise CheckpointError(f"{file} does not match its SHA-256 digest: its bytes have changed. {_ADVICE}")


_ADVICE = "Resume from another checkpoint, or let --resume auto choose one."


def _check_inside(name: str) -> None:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the file name {name!r} leads out of the checkpoint")
