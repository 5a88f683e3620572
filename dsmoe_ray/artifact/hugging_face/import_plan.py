"""Whether and how a model in a stock format can be held: a pure decision about its ``config.json``.

What computes otherwise than our layers is refused, with all reasons at once; GraniteMoe's multipliers are folded into
weights and settings of ours instead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from dsmoe_ray.artifact.hugging_face.formats import MODEL_CLASSES, Format
from dsmoe_ray.artifact.hugging_face.import_fields import SCHEMAS, GraniteMoeFields, StockFields
from dsmoe_ray.config_io import parse_config
from dsmoe_ray.errors import ArtifactError, ConfigError
from dsmoe_ray.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """How a model in a stock format becomes one of ours."""

    kind: Format
    model_config: ModelConfig
    scales: dict[str, float]
    """Factors of parameters of ours; see ``find_scale``."""
    folded: list[str]
    """What was folded into weights and settings, one sentence each."""


def plan_import(values: Mapping[str, Any], *, source: str) -> ImportPlan:
    """Decide how a model becomes one of ours.

    Args:
        values: Content of its ``config.json``.
        source: Names that file in errors.

    Raises:
        ArtifactError: the file is damaged, or the model cannot be held; tells all reasons.
    """
    known = ", ".join(kind.value for kind in Format)
    model_type = values.get("model_type")
    if model_type not in list(Format):
        raise ArtifactError(f"{source}: model_type {model_type!r} is none of {known}. Only these can be imported.")
    kind = Format(model_type)
    fields = _parse(values, SCHEMAS[kind], source=source)
    obstacles = fields.find_obstacles()
    if fields.architectures not in (None, [MODEL_CLASSES[kind]]):
        obstacles.insert(0, f"its architectures are {fields.architectures}, not {MODEL_CLASSES[kind]}")
    if obstacles:
        raise ArtifactError(f"{source}: this {kind} model cannot be held: {'; '.join(obstacles)}.")
    try:
        config = parse_config(fields.to_values(), ModelConfig, source=source)
    except ConfigError as error:
        raise ArtifactError(str(error)) from error
    if isinstance(fields, GraniteMoeFields):
        return ImportPlan(kind=kind, model_config=config, scales=fields.to_scales(), folded=fields.to_folded())
    return ImportPlan(kind=kind, model_config=config, scales={}, folded=[])


def _parse(values: Mapping[str, Any], schema: type[StockFields], *, source: str) -> StockFields:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{source}: {where}: {first['msg']}; found {first['input']!r:.80}.") from error
