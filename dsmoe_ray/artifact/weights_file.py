"""One safetensors file, mapped into memory: where each tensor lies, and views of its bytes. Knows no manifest.

The format is an 8-byte little-endian length, that many bytes of JSON (name -> dtype, shape, begin and end), then the
data. Everything in the header is checked before it is used, so a hostile file gives an error and nothing else.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError

from dsmoe_ray.config_io import Config
from dsmoe_ray.errors import ArtifactError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_ADVICE = "The file is damaged; copy the artifact from its source again."


class StoredTensor(Config):
    """A tensor's entry in the header."""

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]
    """First byte and the one after the last, counted from the end of the header."""


_HEADER = TypeAdapter(dict[str, StoredTensor])


class WeightsFile:
    """A mapped file. Tensors share its memory; writing to one changes this process's copy and never the file."""

    def __init__(self, path: Path, *, size_bytes: int, header_sha256: str) -> None:
        """Map a file that must have this size and this header.

        Raises:
            ArtifactError: it is missing, has another size or header, or is not a safetensors file.
        """
        self.path = path
        try:
            with path.open("rb") as stream:
                # Private and writable: torch has no read-only tensors, and a stray write must not kill the process.
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}. {_ADVICE}") from error
        if len(self._map) != size_bytes:
            raise ArtifactError(f"{path} has {len(self._map)} bytes; the manifest says {size_bytes}. {_ADVICE}")
        self._data_start = self._find_data(header_sha256)
        self.tensors = self._read_header()

    def view(self, name: str) -> torch.Tensor:
        """Return a tensor of the file."""
        entry = self.tensors[name]
        return self._view(entry.data_offsets[0], DTYPES[entry.dtype], tuple(entry.shape))

    def view_stacked(self, names: Sequence[str]) -> torch.Tensor:
        """Return tensors of equal shape that lie one after another as one, with a leading axis for them.

        Raises:
            ArtifactError: they do not lie so.
        """
        entries = [self.tensors[name] for name in names]
        first = entries[0]
        for name, before, entry in zip(names[1:], entries, entries[1:], strict=False):
            follows = before.data_offsets[1] == entry.data_offsets[0]
            if not follows or (entry.dtype, entry.shape) != (first.dtype, first.shape):
                raise ArtifactError(f"{self.path}: {name} does not lie right after the expert before it. {_ADVICE}")
        return self._view(first.data_offsets[0], DTYPES[first.dtype], (len(names), *first.shape))

    def release_pages(self) -> None:
        """Let go of the memory that reading took; what is looked at again comes back from the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def release_tensor(self, name: str) -> None:
        """Let go likewise of the pages that hold nothing but this tensor."""
        begin, end = self._place(name)
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def prefetch(self, name: str) -> None:
        """Begin to read a tensor from the disk, all of it at once; looked at page by page it would come in pieces."""
        begin, end = self._place(name)
        begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def _place(self, name: str) -> tuple[int, int]:
        """Return where a tensor's bytes begin and end."""
        begin, end = self.tensors[name].data_offsets
        return self._data_start + begin, self._data_start + end

    def _view(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        flat = torch.frombuffer(self._map, dtype=dtype, count=math.prod(shape), offset=self._data_start + begin)
        return flat.view(shape)

    def _find_data(self, header_sha256: str) -> int:
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        start = _LENGTH_BYTES + length
        if length > _MAX_HEADER_BYTES or start > len(self._map):
            raise ArtifactError(f"{self.path} claims a header of {length} bytes, which it cannot hold. {_ADVICE}")
        if hashlib.sha256(self._map[:start]).hexdigest() != header_sha256:
            raise ArtifactError(f"{self.path}: the header does not match its SHA-256 digest. {_ADVICE}")
        return start

    def _read_header(self) -> dict[str, StoredTensor]:
        start = self._data_start
        try:
            fields = json.loads(self._map[_LENGTH_BYTES:start])
            if isinstance(fields, dict):
                fields.pop("__metadata__", None)
            tensors = _HEADER.validate_python(fields, strict=True)
            _check_layout(tensors, data_bytes=len(self._map) - start)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the header"
            raise ArtifactError(f"{self.path}: {where}: {first['msg']}. {_ADVICE}") from error
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{self.path} has an unreadable header: {error}. {_ADVICE}") from error
        return tensors


def digest_header(path: Path) -> str:
    """Return the SHA-256 of all that comes before the data in a file that was just written."""
    with path.open("rb") as stream:
        length = stream.read(_LENGTH_BYTES)
        return hashlib.sha256(length + stream.read(int.from_bytes(length, "little"))).hexdigest()


def digest_tensor(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a contiguous CPU tensor's bytes, whatever its type."""
    # NumPy knows no bfloat16; bytes are bytes.
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _check_layout(tensors: dict[str, StoredTensor], *, data_bytes: int) -> None:
    """Check that tensors cover the data without gap or overlap, each as long as its shape says."""
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ValueError(f"{name} is of type {entry.dtype!r}; known are {', '.join(DTYPES)}")
        begin, after = entry.data_offsets
        length = math.prod(entry.shape) * dtype.itemsize
        if begin != end or after - begin != length or length == 0:
            raise ValueError(f"{name} lies at {begin}..{after}; expected {end}..{end + length}")
        end = after
    if end != data_bytes:
        raise ValueError(f"tensors end at byte {end} of {data_bytes}")
