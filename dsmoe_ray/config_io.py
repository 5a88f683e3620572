"""YAML and ``--set`` overrides to a frozen configuration, and the resolved configuration back to YAML.

Owns the base class ``Config`` and how a mistake in a file is told to a person. Knows no particular configuration.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dsmoe_ray.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: frozen, keyword-only, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


C = TypeVar("C", bound=Config)


def load_config(path: Path, schema: type[C], *, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply ``a.b=c`` overrides and validate the result.

    Raises:
        ConfigError: the file is missing, is not a YAML mapping, or does not fit the schema; names file and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}. Give the path of a YAML file.") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a YAML mapping with sections; found {type(values).__name__}.")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, schema, source=str(path))


def parse_config(values: Mapping[str, Any], schema: type[C], *, source: str) -> C:
    """Validate plain values; ``source`` names their origin in error messages."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = [_explain(item, schema) for item in error.errors(include_url=False)]
        raise ConfigError(f"{source} has {len(lines)} problem(s):\n" + "\n".join(f"  - {line}" for line in lines)) from error


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_digest(config: Config) -> str:
    """Return the SHA-256 of the resolved configuration, independent of key order."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override!r} is not of the form section.key=value, e.g. --set train.steps=100.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    node: Any = values
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a section; it cannot hold {parts[-1]!r}.")
    node[parts[-1]] = value


def _explain(item: Any, schema: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    where = ".".join(location) or "the config"
    if item["type"] == "extra_forbidden":
        allowed = _fields_at(schema, location[:-1])
        nearest = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"allowed here: {', '.join(sorted(allowed)) or 'nothing'}."
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: required and not given; add it to the file or pass --set {where}=VALUE."
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {message}"
    return f"{where}: {message}; found {item['input']!r}."


def _fields_at(schema: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Return the keys allowed at a location; a union's tag counts as a step, as in pydantic's locations."""
    candidates: list[type[BaseModel]] = [schema]
    for part in location:
        found: list[type[BaseModel]] = []
        for model in candidates:
            if part in model.model_fields:
                found += _models_in(model.model_fields[part].annotation)
        candidates = found or [model for model in candidates if _tag(model) == part]
    return [name for model in candidates for name in model.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, UnionType):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    if get_args(annotation):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    arguments = get_args(field.annotation) if field else ()
    return str(arguments[0]) if arguments else None
