"""What an artifact consists of: the list of its files and tensors with their digests. Reads and checks all but weights.

``manifest.json`` carries a digest of itself, the digests of the small files and one for each tensor, so that a reader
can check just what it uses. Names of files are checked against patterns: none can lead out of the directory.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from dsmoe_ray.artifact.calibration_record import CalibrationRecord
from dsmoe_ray.artifact.layout import count_stored, stored_shapes
from dsmoe_ray.config_io import Config, config_digest, parse_config
from dsmoe_ray.durable import from_sealed_json, to_sealed_json
from dsmoe_ray.errors import ArtifactError, ConfigError
from dsmoe_ray.model.config import GqaConfig, ModelConfig, MoeConfig

FORMAT_VERSION = 1
MANIFEST, CONFIG, TOKENIZER, GENERATION = "manifest.json", "config.json", "tokenizer.json", "generation_config.json"
INDEX = "model.safetensors.index.json"
CHAT_TEMPLATE = "chat_template.jinja"
SIDE_FILES = (CONFIG, TOKENIZER, GENERATION, INDEX)
OPTIONAL_SIDE_FILES = (CHAT_TEMPLATE,)
_WEIGHTS_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_MAX_SIDE_BYTES = 1 << 30
_ADVICE = "Copy the artifact from its source again."

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SideFile(Config):
    """A small file beside the weights."""

    sha256: Sha256
    size_bytes: NonNegativeInt


class WeightsDigest(Config):
    """A file of weights; each tensor in it has a digest of its own."""

    size_bytes: NonNegativeInt
    header_sha256: Sha256
    """Of everything before the data: it tells where the tensors lie."""


class TensorDigest(Config):
    """What a tensor's bytes must be."""

    dtype: Literal["F32", "BF16"]
    shape: list[PositiveInt]
    sha256: Sha256


class ArtifactManifest(Config):
    """Everything that makes an artifact, by name and digest."""

    format_version: Literal[1]
    config_sha256: Sha256
    """Of the model's configuration, independent of formatting."""
    routing: dict[str, Any]
    """Router settings of ``attention`` and ``ffn``, None for a part without a router."""
    provenance: dict[str, Any]
    """Where the model comes from: run, step, data; nothing depends on it."""
    side_files: dict[str, SideFile]
    weight_files: Annotated[dict[str, WeightsDigest], Field(min_length=1)]
    tensors: Annotated[dict[str, TensorDigest], Field(min_length=1)]
    calibration: CalibrationRecord | None = None
    """How the deployed routing of the FFN was chosen, if it was by calibration."""

    def to_bytes(self) -> bytes:
        """Return the content of the file, sealed; a manifest without calibration does not name it."""
        absent = {"calibration"} if self.calibration is None else set()
        return to_sealed_json(self.model_dump(mode="json", exclude=absent))


class _Index(Config):
    metadata: dict[str, Any]
    weight_map: dict[str, str]


_GENERATION = TypeAdapter(dict[str, Any])


def describe_routing(config: ModelConfig) -> dict[str, Any]:
    """Return the router settings of a model as they stand in the manifest."""
    attention = None if isinstance(config.attention, GqaConfig) else config.attention.router.model_dump(mode="json")
    return {
        "attention": attention,
        "ffn": config.ffn.router.model_dump(mode="json") if isinstance(config.ffn, MoeConfig) else None,
    }


def read_manifest(directory: Path) -> ArtifactManifest:
    """Read the manifest of an artifact and check it against its own digest.

    Raises:
        ArtifactError: there is no artifact, or the manifest is damaged or of an unknown format.
    """
    path = directory / MANIFEST
    # Unlike pathlib's, this is False and no error where a directory may not be entered.
    if not os.path.isfile(path):
        raise ArtifactError(f"{directory} holds no artifact: {MANIFEST} is missing. Give the directory of one.")
    try:
        fields = from_sealed_json(_read_limited(path))
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{path}: format version {version!r} is unknown; this release reads {FORMAT_VERSION}. "
                "Use a release that knows it."
            )
        manifest = ArtifactManifest.model_validate(fields, strict=True)
    except ValidationError as error:
        raise _to_artifact_error(path, error) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}. {_ADVICE}") from error
    _check_names(path, "side_files", set(manifest.side_files) - set(OPTIONAL_SIDE_FILES), wanted=set(SIDE_FILES))
    for name in manifest.weight_files:
        if _WEIGHTS_NAME.fullmatch(name) is None:
            raise ArtifactError(f"{path}: {name!r} is not the name of a weights file. {_ADVICE}")
    return manifest


def read_side_file(directory: Path, name: str, manifest: ArtifactManifest) -> bytes:
    """Return the verified content of a small file.

    Raises:
        ArtifactError: it is missing or not what the manifest says.
    """
    data = _read_limited(directory / name)
    expected = manifest.side_files[name]
    if len(data) != expected.size_bytes:
        raise ArtifactError(f"{directory / name} has {len(data)} bytes, not {expected.size_bytes}. {_ADVICE}")
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise ArtifactError(f"{directory / name} does not match its SHA-256 digest: its bytes changed. {_ADVICE}")
    return data


def read_model_config(directory: Path, manifest: ArtifactManifest) -> ModelConfig:
    """Return the verified configuration of the model; the manifest lists exactly its tensors.

    Raises:
        ArtifactError: it is damaged, or does not fit the manifest.
    """
    path = directory / CONFIG
    fields = _parse_json(path, read_side_file(directory, CONFIG, manifest))
    if not isinstance(fields, dict):
        raise ArtifactError(f"{path} must hold a JSON object; found {type(fields).__name__}. {_ADVICE}")
    try:
        config = parse_config(fields, ModelConfig, source=str(path))
    except ConfigError as error:
        raise ArtifactError(str(error)) from error
    if config_digest(config) != manifest.config_sha256 or describe_routing(config) != manifest.routing:
        raise ArtifactError(f"{path} is not the configuration that {MANIFEST} was made for. {_ADVICE}")
    _check_tensors(path, config, manifest)
    return config


def read_index(directory: Path, manifest: ArtifactManifest) -> dict[str, str]:
    """Return the name of the weights file of each tensor, verified.

    Raises:
        ArtifactError: the index is damaged or does not fit the manifest.
    """
    path = directory / INDEX
    try:
        index = _Index.model_validate(_parse_json(path, read_side_file(directory, INDEX, manifest)), strict=True)
    except ValidationError as error:
        raise _to_artifact_error(path, error) from error
    _check_names(path, "tensors", set(index.weight_map), wanted=set(manifest.tensors))
    _check_names(path, "files", set(index.weight_map.values()), wanted=set(manifest.weight_files))
    return index.weight_map


def read_generation_config(directory: Path, manifest: ArtifactManifest) -> dict[str, Any]:
    """Return the verified defaults for generation.

    Raises:
        ArtifactError: the file is damaged.
    """
    path = directory / GENERATION
    try:
        return _GENERATION.validate_python(_parse_json(path, read_side_file(directory, GENERATION, manifest)))
    except ValidationError as error:
        raise _to_artifact_error(path, error) from error


def _check_tensors(path: Path, config: ModelConfig, manifest: ArtifactManifest) -> None:
    # Counted first: a config may ask for more tensors than could be listed.
    if count_stored(config) != len(manifest.tensors):
        raise ArtifactError(
            f"{path} describes a model of {count_stored(config)} tensors; {MANIFEST} lists {len(manifest.tensors)}. "
            f"{_ADVICE}"
        )
    shapes = stored_shapes(config)
    _check_names(path, "tensors", set(manifest.tensors), wanted=set(shapes))
    for name, shape in shapes.items():
        found = tuple(manifest.tensors[name].shape)
        if found != shape:
            raise ArtifactError(f"{name} has shape {found} in {MANIFEST}; {path} needs {shape}. {_ADVICE}")


def _check_names(path: Path, what: str, found: set[str], *, wanted: set[str]) -> None:
    if found != wanted:
        missing, strange = sorted(wanted - found)[:3], sorted(found - wanted)[:3]
        raise ArtifactError(f"{path}: {what} do not fit; missing: {missing}; not expected: {strange}. {_ADVICE}")


def _read_limited(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_SIDE_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}. {_ADVICE}") from error
    if len(data) > _MAX_SIDE_BYTES:
        raise ArtifactError(f"{path} is larger than {_MAX_SIDE_BYTES} bytes; it is not read.")
    return data


def _parse_json(path: Path, data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}. {_ADVICE}") from error


def _to_artifact_error(path: Path, error: ValidationError) -> ArtifactError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return ArtifactError(f"{path}: {where}: {first['msg']}. {_ADVICE}")
