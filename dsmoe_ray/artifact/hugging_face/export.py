"""Write an artifact in a stock format: tensor by tensor, in files of bounded size, committed by one rename."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dsmoe_ray.artifact.hugging_face.export_plan import ExportPlan
from dsmoe_ray.artifact.hugging_face.formats import Move, filler_shapes, find_scale, is_power_of_two, iterate_moves
from dsmoe_ray.artifact.hugging_face.tokens import TOKENIZER_CONFIG, describe_tokenizer, special_token_ids
from dsmoe_ray.artifact.layout import model_shapes
from dsmoe_ray.artifact.load import Artifact
from dsmoe_ray.artifact.manifest import CHAT_TEMPLATE, CONFIG, GENERATION, INDEX, TOKENIZER
from dsmoe_ray.artifact.save import check_target
from dsmoe_ray.durable import commit_directory, delete_directory, sync_file, write_durably
from dsmoe_ray.errors import ArtifactError

MAX_FILE_BYTES = 2 << 30
SINGLE_FILE = "model.safetensors"


class WrittenModel(NamedTuple):
    """What an export left."""

    directory: Path
    dtype: torch.dtype
    files: dict[str, int]
    """Bytes of each file."""


def export_model(
    artifact: Artifact,
    directory: Path,
    plan: ExportPlan,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> WrittenModel:
    """Write a model as planned; the directory must not be there, or be empty.

    Args:
        artifact: The model.
        directory: Where to write; its parent is created if need be.
        plan: See ``plan_export``.
        dtype: Type of the weights; by default float32 if the artifact has weights of that type, else bfloat16.
        max_file_bytes: A weights file is closed before it exceeds this; held in memory until then.

    Raises:
        ArtifactError: the directory is in use, the artifact is damaged, or a weight would lose digits.
    """
    check_target(directory)
    dtype = dtype or _widest(artifact)
    _check_scales(plan, dtype)
    # Read before anything is written, as they may turn out to be unusable.
    small_files = _to_small_files(artifact, plan, dtype)
    staging = directory.with_name(f".staging-{directory.name}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        delete_directory(staging)
        staging.mkdir()
        writer = _ShardWriter(staging, max_file_bytes=max_file_bytes)
        for name, tensor in _iterate_tensors(artifact, plan):
            writer.add(name, tensor.to(dtype))
        writer.finish()
        for name, data in small_files.items():
            write_durably(staging / name, data)
        files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
        commit_directory(staging, directory)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{directory} cannot be written: {error}. Give another directory to write to.") from error
    finally:
        delete_directory(staging)
    return WrittenModel(directory, dtype, files)


def _widest(artifact: Artifact) -> torch.dtype:
    found = {tensor.dtype for tensor in artifact.manifest.tensors.values()}
    return torch.float32 if "F32" in found else torch.bfloat16


def _check_scales(plan: ExportPlan, dtype: torch.dtype) -> None:
    for name, factor in plan.scales.items():
        if dtype != torch.float32 and not is_power_of_two(factor):
            raise ArtifactError(
                f"gate_scale={factor} must be multiplied into {name}, which in {dtype} would lose digits. "
                "Add --dtype float32."
            )


def _iterate_tensors(artifact: Artifact, plan: ExportPlan) -> Iterator[tuple[str, torch.Tensor]]:
    """Return their tensors one by one; those of one layer hold memory at a time, and only if they are no views."""
    config = artifact.model_config
    shapes = model_shapes(config)
    for move in iterate_moves(plan.kind, config):
        tensor = _join(artifact, move, plan.scales)
        names = move.names(shapes)
        yield from zip(names, tensor if len(names) > 1 or "{expert}" in move.theirs else [tensor], strict=True)
    for name, shape in filler_shapes(plan.kind, config).items():
        yield name, torch.zeros(shape)


def _join(artifact: Artifact, move: Move, scales: Mapping[str, float]) -> torch.Tensor:
    parts = []
    for name in move.ours:
        tensor = artifact.load_parameter(name)
        factor = find_scale(name, scales)
        parts.append(tensor if factor == 1.0 else tensor.float() * factor)
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
    return joined.mT if move.transposed else joined


def _to_small_files(artifact: Artifact, plan: ExportPlan, dtype: torch.dtype) -> dict[str, bytes]:
    type_name = str(dtype).removeprefix("torch.")
    tokens = special_token_ids(artifact.generation_config)
    # Both spellings of the type, as with rotary positions: one is old, one new.
    fields = plan.fields | tokens | {"dtype": type_name, "torch_dtype": type_name}
    contents = {
        CONFIG: _to_json(fields),
        GENERATION: _to_json(artifact.generation_config),
        TOKENIZER: artifact.tokenizer_json.encode(),
        TOKENIZER_CONFIG: _to_json(
            describe_tokenizer(artifact.tokenizer_json, tokens, max_seq_len=artifact.model_config.max_seq_len)
        ),
    }
    if artifact.chat_template is not None:
        contents[CHAT_TEMPLATE] = artifact.chat_template.encode()
    return contents


class _ShardWriter:
    """Cuts the weights into files of bounded size; a single file needs no index."""

    def __init__(self, directory: Path, *, max_file_bytes: int) -> None:
        self._directory = directory
        self._max_file_bytes = max_file_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._names: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take the next tensor."""
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_file_bytes:
            self._flush()
        # The library takes neither views of one another nor transposed ones.
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is pending, give the files their names, which hold their number, and write the index."""
        self._flush()
        if len(self._names) == 1:
            self._part(1).rename(self._directory / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._names, start=1):
            name = f"model-{number:05d}-of-{len(self._names):05d}.safetensors"
            self._part(number).rename(self._directory / name)
            weight_map |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_durably(self._directory / INDEX, _to_json(index))

    def _flush(self) -> None:
        self._names.append(sorted(self._pending))
        path = self._part(len(self._names))
        save_file(self._pending, path, metadata={"format": "pt"})
        sync_file(path)
        self._pending, self._pending_bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number}"


def _to_json(fields: Mapping[str, Any]) -> bytes:
    return (json.dumps(fields, indent=2) + "\n").encode()
