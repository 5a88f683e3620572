"""Which files hold the documents of a corpus, in which order, and which documents are held out.

Reads names, sizes and times only, never text. Order and choice depend on names and contents alone, so that every
machine and every number of workers comes to the same corpus.
"""

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dsmoe_ray.data.config import DataConfig
from dsmoe_ray.errors import DataError

_HASH_BYTES = 8


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus."""

    path: str
    """Where it is, absolute."""
    name: str
    """Its path relative to the source it was found in, with ``/``; what decides whether it is held out."""
    size_bytes: int
    mtime_ns: int

    @property
    def identity(self) -> bytes:
        """Return what decides whether a file that is one document is held out."""
        return os.fsencode(self.name)


def list_sources(paths: Sequence[str], *, include: str = "*", exclude: Sequence[str] = ()) -> list[SourceFile]:
    """List the files behind some paths: paths in the order given, each one's files by name; each file once.

    A directory is searched for files whose name matches ``include``, except below directories named in ``exclude``
    and hidden ones. A path that is a file is taken as it is. ``{stdlib}`` and ``~`` are expanded.

    Raises:
        DataError: a path does not exist, or no file in it matches.
    """
    sources: dict[str, SourceFile] = {}
    for given in paths:
        for source in _list_one(given, include=include, exclude=exclude):
            # The same file through two paths would train on it twice, or train on what is held out.
            sources.setdefault(os.path.realpath(source.path), source)
    return list(sources.values())


def expand_path(given: str) -> Path:
    """Return the absolute path that an entry of ``data.paths`` means."""
    expanded = given.replace("{stdlib}", sysconfig.get_path("stdlib"))
    return Path(os.path.abspath(os.path.expanduser(expanded)))


def digest_listing(sources: Sequence[SourceFile]) -> str:
    """Return a SHA-256 that changes when a file comes, goes, grows or is written again."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(os.fsencode(f"{source.path}\0{source.name}\0{source.size_bytes}\0{source.mtime_ns}\n"))
    return digest.hexdigest()


def hash_unit(identity: bytes) -> float:
    """Return a number in ``[0, 1)`` that is uniform over identities and the same everywhere, always."""
    digest = hashlib.blake2b(identity, digest_size=_HASH_BYTES, person=b"dsmoe-data").digest()
    # 53 bits, so that the quotient is exact and never rounds up to 1.
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def choose_held_out_ratio(sources: Sequence[SourceFile], *, config: DataConfig) -> float:
    """Return ``config.held_out_ratio``, or as much more as it takes to hold out one of a few files.

    Rows are too many to know before they are read; for them it is always the configured one.
    """
    if config.format != "text" or len(sources) < 2:
        return config.held_out_ratio
    return max(config.held_out_ratio, math.nextafter(min(hash_unit(source.identity) for source in sources), 1.0))


def is_held_out(identity: bytes, ratio: float) -> bool:
    """Tell whether the document of this name or content is kept for evaluation; ``ratio`` of all are."""
    return hash_unit(identity) < ratio


def _list_one(given: str, *, include: str, exclude: Sequence[str]) -> list[SourceFile]:
    root = expand_path(given)
    # os.path, because pathlib raises where a directory may not be entered.
    if os.path.isfile(root):
        return [_describe(root, root.name)]
    if not os.path.isdir(root):
        raise DataError(f"data.paths holds {given!r}, but there is no file or directory {root}. Correct the path.")
    found = sorted(_walk(root, include=include, exclude=frozenset(exclude)), key=lambda source: source.name)
    if not found:
        raise DataError(
            f"no file in {root} has a name that matches data.include={include!r} (directories left out: "
            f"{', '.join(exclude) or 'none'}, and hidden ones). Change data.paths, data.include or data.exclude."
        )
    return found


def _walk(root: Path, *, include: str, exclude: frozenset[str]) -> Iterator[SourceFile]:
    for directory, directory_names, file_names in os.walk(root, onerror=_refuse_unreadable):
        directory_names[:] = [name for name in directory_names if name not in exclude and not name.startswith(".")]
        for name in file_names:
            hidden = name.startswith(".") and not include.startswith(".")
            path = Path(directory, name)
            # A pipe or a socket among the files would block whoever opens it; a dangling link only fails to open.
            if not hidden and fnmatchcase(name, include) and (path.is_file() or path.is_symlink()):
                yield _describe(path, path.relative_to(root).as_posix())


def _refuse_unreadable(error: OSError) -> None:
    raise DataError(f"cannot list {error.filename}: {error.strerror}. Give access to it, or add it to data.exclude.")


def _describe(path: Path, name: str) -> SourceFile:
    try:
        status = path.stat()
    except OSError:
        # A dangling link: reading it fails too, and that is where it is counted and reported.
        return SourceFile(path=str(path), name=name, size_bytes=0, mtime_ns=0)
    return SourceFile(path=str(path), name=name, size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)
