"""The files of somebody's model: small ones read whole within limits, weights by name from safetensors.

Nothing of them is trusted and nothing is run: names cannot lead out of the directory, pickled weights are refused, and
whatever is damaged is an ``ArtifactError`` that names the file.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open

from dsmoe_ray.artifact.manifest import INDEX
from dsmoe_ray.errors import ArtifactError

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")
_MAX_SMALL_BYTES = 256 << 20
_SINGLE_FILE = "model.safetensors"
_ADVICE = "Copy the model from its source again."


class TensorEntry(NamedTuple):
    """What a file says of a tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_text(path: Path) -> str | None:
    """Return the content of a small file, or None if there is none.

    Raises:
        ArtifactError: it is too large, no text, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_SMALL_BYTES + 1)
        text = data.decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}. {_ADVICE}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8: {error}. {_ADVICE}") from error
    if len(data) > _MAX_SMALL_BYTES:
        raise ArtifactError(f"{path} is larger than {_MAX_SMALL_BYTES} bytes; it is not read.")
    return text


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the content of a small JSON file, or None if there is none.

    Raises:
        ArtifactError: it is no JSON object.
    """
    text = read_text(path)
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}. {_ADVICE}") from error
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path} must hold a JSON object; found {type(fields).__name__}. {_ADVICE}")
    return fields


class CheckpointWeights:
    """All tensors of a model directory, opened and not read; a context manager that closes the files."""

    def __init__(self, directory: Path) -> None:
        """Open the weights files, one or many, with an index or without.

        Raises:
            ArtifactError: there are none, or they are damaged or do not fit the index.
        """
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        self._streams: dict[Path, Any] = {}
        self._open_files = ExitStack()
        try:
            for path in _list_files(directory):
                self._open(path)
            _check_index(directory, self.entries)
        except BaseException:
            self.close()
            raise

    def load(self, name: str) -> torch.Tensor:
        """Return one tensor; it shares the mapped file's memory where the library can.

        Raises:
            ArtifactError: its bytes cannot be read.
        """
        path = self.entries[name].file
        with _translated(path):
            return self._streams[path].get_tensor(name)

    def close(self) -> None:
        """Close all files."""
        self._open_files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> None:
        with _translated(path):
            stream = self._streams[path] = self._open_files.enter_context(safe_open(path, framework="pt"))
            for name in stream.keys():
                part = stream.get_slice(name)
                if name in self.entries:
                    raise ArtifactError(f"{path} and {self.entries[name].file} both hold {name}. {_ADVICE}")
                self.entries[name] = TensorEntry(path, part.get_dtype(), tuple(part.get_shape()))


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is no safetensors file, or damaged: {error}. {_ADVICE}") from error


def _list_files(directory: Path) -> list[Path]:
    """Return the weights files: those of the index, else the single one, else all there are."""
    index = _read_index(directory)
    if index is not None:
        return [directory / name for name in sorted(set(index.values()))]
    single = directory / _SINGLE_FILE
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        raise ArtifactError(
            f"{directory} holds {pickled[0]}: pickled weights, which run code when they are read. Convert them where "
            "they are trusted: load the model with transformers and save it with save_pretrained, as safetensors."
        )
    raise ArtifactError(f"{directory} holds no *.safetensors. Give the directory of a complete model.")


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX
    fields = read_object(path)
    if fields is None:
        return None
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{path} has no weight_map from tensors to files. {_ADVICE}")
    for name in weight_map.values():
        if not isinstance(name, str) or _FILE_NAME.fullmatch(name) is None:
            raise ArtifactError(f"{path}: {name!r:.80} is not the name of a weights file. {_ADVICE}")
    return weight_map


def _check_index(directory: Path, entries: dict[str, TensorEntry]) -> None:
    for name, file in (_read_index(directory) or {}).items():
        if name not in entries or entries[name].file.name != file:
            raise ArtifactError(f"{directory / file} lacks {name}, which {INDEX} places there. {_ADVICE}")
