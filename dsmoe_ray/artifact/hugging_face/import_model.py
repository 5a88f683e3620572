"""Read a model in a stock format from a local directory into an artifact, tensor by tensor."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from dsmoe_ray.artifact.hugging_face.checkpoint import CheckpointWeights, read_object, read_text
from dsmoe_ray.artifact.hugging_face.formats import (
    Move,
    count_tensors,
    find_scale,
    first_names,
    is_power_of_two,
    iterate_moves,
    num_layouts,
    optional_shapes,
    their_shapes,
)
from dsmoe_ray.artifact.hugging_face.import_plan import ImportPlan, plan_import
from dsmoe_ray.artifact.hugging_face.tokens import read_chat_template, read_generation_config
from dsmoe_ray.artifact.layout import Shape, model_shapes
from dsmoe_ray.artifact.manifest import CONFIG, TOKENIZER, ArtifactManifest
from dsmoe_ray.artifact.save import check_target, save_artifact
from dsmoe_ray.errors import ArtifactError

_DTYPES = ("F32", "BF16", "F16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Constants that old versions stored; computed from the settings everywhere.
_NOISE = "rotary_emb.inv_freq"


class OpenedModel(NamedTuple):
    """A model directory whose every file but the weights was read and found usable."""

    directory: Path
    plan: ImportPlan
    tokenizer_json: str
    generation_config: dict[str, Any]
    chat_template: str | None

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a text; empty if the model does not say."""
        found = self.generation_config.get("eos_token_id")
        return found if isinstance(found, list) else [] if found is None else [found]


def open_model(directory: Path) -> OpenedModel:
    """Read everything but the weights.

    Raises:
        ArtifactError: it is no directory of a model that we can hold; tells why.
    """
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory. Download the model first and give the directory of it.")
    fields = read_object(directory / CONFIG)
    if fields is None:
        raise ArtifactError(f"{directory} holds no {CONFIG}. Give the directory of a model.")
    plan = plan_import(fields, source=str(directory / CONFIG))
    tokenizer_json = read_text(directory / TOKENIZER)
    if tokenizer_json is None:
        raise ArtifactError(
            f"{directory} holds no {TOKENIZER}. Load its tokenizer with transformers' AutoTokenizer and save it there."
        )
    generation = read_generation_config(directory, fields, vocab_size=plan.model_config.vocab_size)
    return OpenedModel(directory, plan, tokenizer_json, generation, read_chat_template(directory))


def import_model(opened: OpenedModel, directory: Path, *, provenance: Mapping[str, Any]) -> ArtifactManifest:
    """Write a model as an artifact; the directory must not be there, or be empty.

    Weights keep their type, but float16 becomes float32, and so does what a multiplier is folded into if digits would
    be lost otherwise.

    Raises:
        ArtifactError: the directory is in use, or weights are missing, not expected, damaged or not what we can hold.
    """
    check_target(directory)
    with CheckpointWeights(opened.directory) as weights:
        layout = _check_weights(opened.plan, weights)
        try:
            return save_artifact(
                directory,
                model_config=opened.plan.model_config,
                tensors=_iterate_parameters(opened.plan, weights, layout),
                tokenizer_json=opened.tokenizer_json,
                provenance=provenance,
                generation_config=opened.generation_config,
                chat_template=opened.chat_template,
            )
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{directory} cannot be written: {error}. Give another directory to write to."
            ) from error


def _check_weights(plan: ImportPlan, weights: CheckpointWeights) -> int:
    """Check that there are exactly the tensors that the config asks for; return which names are used."""
    layout = _find_layout(plan, weights)
    expected = their_shapes(plan.kind, plan.model_config, layout=layout)
    optional = optional_shapes(plan.kind, plan.model_config)
    for name, shape in expected.items():
        if name not in weights.entries:
            raise ArtifactError(f"{weights.directory} lacks {name}. Copy the model from its source again.")
        _check_entry(name, weights, shape)
    for name in sorted(weights.entries.keys() - expected.keys()):
        if name in optional:
            _check_entry(name, weights, optional[name])
            _check_zero(name, weights)
        elif name == _HEAD:
            _check_tied(weights)
        elif not name.endswith(_NOISE):
            raise ArtifactError(f"{weights.entries[name].file} holds {name}, which a stock {plan.kind} model has not.")
    return layout


def _find_layout(plan: ImportPlan, weights: CheckpointWeights) -> int:
    """Return the way of naming that the first layer follows best."""
    config, found = plan.model_config, weights.entries.keys()
    layout = max(range(num_layouts(plan.kind)), key=lambda layout: len(first_names(plan.kind, layout) & found))
    # Counted first: a config may ask for more tensors than could be listed.
    wanted = count_tensors(plan.kind, config, layout=layout)
    if wanted > len(found):
        raise ArtifactError(
            f"{weights.directory} holds {len(found)} tensors; config.json describes a {plan.kind} model of {wanted}. "
            "Copy the model from its source again."
        )
    return layout


def _check_entry(name: str, weights: CheckpointWeights, shape: Shape) -> None:
    entry = weights.entries[name]
    if entry.shape != shape:
        raise ArtifactError(f"{entry.file}: {name} has shape {entry.shape}; config.json asks for {shape}.")
    if entry.dtype not in _DTYPES:
        raise ArtifactError(f"{entry.file}: {name} is {entry.dtype}; only {', '.join(_DTYPES)} can be imported.")


def _check_zero(name: str, weights: CheckpointWeights) -> None:
    # What it weighs is empty, so its value does not matter.
    if not name.endswith("shared_expert_gate.weight") and weights.load(name).count_nonzero():
        raise ArtifactError(f"{weights.entries[name].file}: {name} is not zero; our layers have no biases.")


def _check_tied(weights: CheckpointWeights) -> None:
    head, embedding = weights.entries[_HEAD], weights.entries[_EMBEDDING]
    same_kind = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if not same_kind or not torch.equal(weights.load(_HEAD), weights.load(_EMBEDDING)):
        raise ArtifactError(
            f"{head.file}: {_HEAD} differs from {_EMBEDDING}, though config.json ties them. Set "
            "tie_word_embeddings to false if the head is meant."
        )


def _iterate_parameters(
    plan: ImportPlan, weights: CheckpointWeights, layout: int
) -> Iterator[tuple[str, torch.Tensor]]:
    shapes = model_shapes(plan.model_config)
    for move in iterate_moves(plan.kind, plan.model_config, layout=layout):
        joined = _load(move, weights, shapes)
        parts = joined.split([shapes[name][-2] for name in move.ours], dim=-2) if len(move.ours) > 1 else [joined]
        for name, part in zip(move.ours, parts, strict=True):
            yield name, _scale(part, find_scale(name, plan.scales))


def _load(move: Move, weights: CheckpointWeights, shapes: Mapping[str, Shape]) -> torch.Tensor:
    names = move.names(shapes)
    tensors = [weights.load(name) for name in names]
    tensor = torch.stack(tensors) if "{expert}" in move.theirs else tensors[0]
    if tensor.dtype == torch.float16:
        tensor = tensor.float()
    return tensor.mT if move.transposed else tensor


def _scale(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    if factor == 1.0:
        return tensor
    return tensor * factor if is_power_of_two(factor) else tensor.float() * factor
