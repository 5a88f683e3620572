"""Files and directories that are either whole or not there, whatever moment a process is killed at.

A directory is filled under a hidden staging name and moved to its own name by one rename. Replacing an existing one
takes two renames; what a kill between them leaves behind is put right by ``recover_directory``. Small JSON files carry
a digest of their own content. POSIX semantics of rename and fsync are assumed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

SEAL = "manifest_sha256"
"""Key under which a sealed JSON object holds the digest of everything else in it."""


class FileDigest(NamedTuple):
    """What a file held when it was written."""

    sha256: str
    size_bytes: int


def digest_file(path: Path) -> FileDigest:
    """Read a file and return its digest; other threads run meanwhile."""
    with path.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return FileDigest(sha256, os.fstat(stream.fileno()).st_size)


def write_durably(path: Path, data: bytes) -> FileDigest:
    """Write a new file and wait until it is on the disk; its name needs ``sync_directory`` to be so too."""
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return FileDigest(hashlib.sha256(data).hexdigest(), len(data))


def sync_file(path: Path) -> None:
    """Wait until what another writer put into a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    sync_file(path)


def commit_directory(staging: Path, target: Path) -> None:
    """Give a complete staging directory its final name; an older directory of that name gives way.

    Both must lie in the same parent. A reader sees the old directory, for an instant none, then the new one; never a
    mixture.
    """
    sync_directory(staging)
    aside = _aside(target)
    if target.exists():
        delete_directory(aside)
        target.rename(aside)
    staging.rename(target)
    sync_directory(target.parent)
    delete_directory(aside)


def recover_directory(target: Path) -> None:
    """Undo or finish a replacement that was cut short, so that either the old or the new directory is there."""
    aside = _aside(target)
    if not aside.exists():
        return
    if target.exists():
        delete_directory(aside)
    else:
        aside.rename(target)
        sync_directory(target.parent)


def replaced_name(name: str) -> str | None:
    """Return the name that a set-aside directory had, or None if this is not one."""
    return name.removeprefix(_ASIDE) if name.startswith(_ASIDE) else None


def delete_directory(path: Path) -> None:
    """Remove a directory that may not be there. A kill in mid-way leaves it half empty: hide what readers look for."""
    if path.exists():
        shutil.rmtree(path)


def to_sealed_json(fields: Mapping[str, Any]) -> bytes:
    """Return an object of plain values as JSON that tells on itself when a single character changes."""
    sealed = {**fields, SEAL: _seal(fields)}
    return (json.dumps(sealed, indent=1) + "\n").encode()


def from_sealed_json(data: bytes) -> dict[str, Any]:
    """Return the fields of a sealed JSON object.

    Raises:
        ValueError: the bytes are not JSON, not an object, or not what was sealed; says which.
    """
    try:
        fields = json.loads(data)
        seal = fields.pop(SEAL, None) if isinstance(fields, dict) else None
        intact = seal == _seal(fields)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not valid JSON ({error})") from error
    if seal is None:
        raise ValueError(f"it is not a JSON object with the key {SEAL}")
    if not intact:
        raise ValueError(f"its content does not match its {SEAL}")
    return fields


_ASIDE = ".replaced-"


def _aside(target: Path) -> Path:
    return target.with_name(_ASIDE + target.name)


def _seal(fields: Any) -> str:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
