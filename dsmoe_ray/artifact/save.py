"""Write a published model: one tensor per FFN expert, digests of everything, committed by one rename.

Everything goes to a hidden directory beside the target, which takes the target's name when it is complete. One process
writes an artifact at a time.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsmoe_ray.artifact.layout import Shape, expert_name, is_stacked, model_shapes
from dsmoe_ray.artifact.manifest import (
    CHAT_TEMPLATE,
    CONFIG,
    FORMAT_VERSION,
    GENERATION,
    INDEX,
    MANIFEST,
    TOKENIZER,
    ArtifactManifest,
    SideFile,
    TensorDigest,
    WeightsDigest,
    describe_routing,
)
from dsmoe_ray.artifact.weights_file import DTYPES, digest_header, digest_tensor
from dsmoe_ray.config_io import config_digest
from dsmoe_ray.durable import (
    commit_directory,
    delete_directory,
    recover_directory,
    sync_file,
    write_durably,
)
from dsmoe_ray.errors import ArtifactError
from dsmoe_ray.model.config import ModelConfig

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_FILE_BYTES = 2 << 30


def save_artifact(
    directory: Path,
    *,
    model_config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    tokenizer_json: str,
    provenance: Mapping[str, Any],
    eos_token_id: int | None = None,
    generation_config: Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> ArtifactManifest:
    """Publish a model; an artifact that is there already is replaced once the new one is complete.

    Args:
        directory: The artifact; its parent is created if need be.
        model_config: The model; of a subclass only the fields of ``ModelConfig`` are kept.
        tensors: Every parameter of ``Transformer`` once, in any order; drawn one by one, so they may come from disk.
        tokenizer_json: Content of a ``tokenizer.json``.
        provenance: Plain values that tell where the model comes from.
        eos_token_id: Token that ends a text.
        generation_config: Plain values, more defaults for generation.
        chat_template: Jinja template that turns a conversation into a prompt.
        dtype: Converts the weights; float32 or bfloat16. By default each keeps its type.
        max_file_bytes: A weights file is closed before it exceeds this; held in memory until then.

    Raises:
        ArtifactError: a tensor is missing, not the model's, or of a wrong shape or type; nothing is replaced.
    """
    config = ModelConfig.model_validate(model_config.model_dump(include=set(ModelConfig.model_fields)))
    staging = directory.with_name(f".staging-{directory.name}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(directory)
    delete_directory(staging)
    staging.mkdir()
    try:
        writer = _WeightsWriter(staging, max_file_bytes=max_file_bytes)
        for name, tensor in _check_parameters(tensors, model_shapes(config), dtype):
            writer.add(name, tensor)
        writer.finish()
        generation: dict[str, Any] = {"max_length": config.max_seq_len}
        if eos_token_id is not None:
            generation["eos_token_id"] = eos_token_id
        generation |= generation_config or {}
        side_files = _write_side_files(staging, config, tokenizer_json, generation, chat_template, writer)
        manifest = _describe(config, side_files, writer, provenance)
        write_durably(staging / MANIFEST, manifest.to_bytes())
        commit_directory(staging, directory)
    finally:
        delete_directory(staging)
    return manifest


def check_target(directory: Path) -> None:
    """Check that a directory to write is not there yet, or empty, so that nothing of anyone's is lost.

    Raises:
        ArtifactError: it is in use.
    """
    try:
        in_use = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be looked into: {error.strerror}. Choose another path.") from error
    if in_use:
        raise ArtifactError(f"{directory} is there already and not empty. Choose another path, or remove it first.")


def _check_parameters(
    tensors: Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, Shape], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    missing = dict(shapes)
    for name, tensor in tensors:
        shape = missing.pop(name, None)
        if shape is None:
            raise ArtifactError(f"{name} is not a parameter of this model, or was given twice.")
        if tuple(tensor.shape) != shape:
            raise ArtifactError(f"{name} has shape {tuple(tensor.shape)}; the model config needs {shape}.")
        converted = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
        if converted.dtype not in _DTYPE_NAMES:
            known = ", ".join(str(known) for known in _DTYPE_NAMES)
            raise ArtifactError(f"{name} is {converted.dtype}; an artifact holds {known}. Pass dtype to convert.")
        yield name, converted
    if missing:
        raise ArtifactError(f"the model needs {', '.join(sorted(missing)[:3])}, which was not given.")


class _WeightsWriter:
    """Cuts the weights into files of bounded size and digests them."""

    def __init__(self, directory: Path, *, max_file_bytes: int) -> None:
        self.weight_map: dict[str, str] = {}
        self.files: dict[str, WeightsDigest] = {}
        self.digests: dict[str, TensorDigest] = {}
        self.total_bytes = 0
        self._directory = directory
        self._max_file_bytes = max_file_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._names: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take one parameter; all experts of it go to the same file, where they lie side by side."""
        pending_bytes = sum(pending.nbytes for pending in self._pending.values())
        if self._pending and pending_bytes + tensor.nbytes > self._max_file_bytes:
            self._flush()
        self.total_bytes += tensor.nbytes
        if is_stacked(name):
            self._pending |= {expert_name(name, expert_id): part for expert_id, part in enumerate(tensor)}
        else:
            self._pending[name] = tensor

    def finish(self) -> None:
        """Write what is pending and give the files their names, which hold their number."""
        self._flush()
        for number, names in enumerate(self._names, start=1):
            name = f"model-{number:05d}-of-{len(self._names):05d}.safetensors"
            path = self._part(number).rename(self._directory / name)
            self.files[name] = WeightsDigest(size_bytes=path.stat().st_size, header_sha256=digest_header(path))
            self.weight_map |= dict.fromkeys(names, name)

    def _flush(self) -> None:
        # The library orders by type and then by name: the reason for padded expert numbers.
        self._names.append(sorted(self._pending))
        path = self._part(len(self._names))
        save_file(self._pending, path, metadata={"format": "pt"})
        sync_file(path)
        for name, tensor in self._pending.items():
            self.digests[name] = TensorDigest(
                dtype=_DTYPE_NAMES[tensor.dtype],  # type: ignore[arg-type]
                shape=list(tensor.shape),
                sha256=digest_tensor(tensor),
            )
        self._pending = {}

    def _part(self, number: int) -> Path:
        return self._directory / f"part-{number}"


def _write_side_files(
    staging: Path,
    config: ModelConfig,
    tokenizer_json: str,
    generation: Mapping[str, Any],
    chat_template: str | None,
    writer: _WeightsWriter,
) -> dict[str, SideFile]:
    weight_map = dict(sorted(writer.weight_map.items()))
    index = {"metadata": {"total_size": writer.total_bytes}, "weight_map": weight_map}
    contents = {
        CONFIG: to_json_file(config.model_dump(mode="json")),
        TOKENIZER: tokenizer_json.encode(),
        GENERATION: to_json_file(generation),
        INDEX: to_json_file(index),
    }
    if chat_template is not None:
        contents[CHAT_TEMPLATE] = chat_template.encode()
    return {name: SideFile(**write_durably(staging / name, data)._asdict()) for name, data in contents.items()}


def _describe(
    config: ModelConfig, side_files: dict[str, SideFile], writer: _WeightsWriter, provenance: Mapping[str, Any]
) -> ArtifactManifest:
    return ArtifactManifest(
        format_version=FORMAT_VERSION,
        config_sha256=config_digest(config),
        routing=describe_routing(config),
        provenance=dict(provenance),
        side_files=side_files,
        weight_files=writer.files,
        tensors=dict(sorted(writer.digests.items())),
    )


def to_json_file(fields: Mapping[str, Any]) -> bytes:
    """Return plain values as the content of a side file."""
    return (json.dumps(fields, indent=1) + "\n").encode()
