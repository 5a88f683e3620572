"""YAML and ``--set`` overrides to a frozen configuration, and the resolved configuration back to YAML.

Owns the base class ``Config``. Knows no particular configuration.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from dsmoe_ray.config_messages import explain_errors
from dsmoe_ray.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: frozen, keyword-only, unknown keys refused, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _a_boolean_is_no_number(cls, values: Any) -> Any:
        # pydantic would take true for 1, and YAML takes yes and on for true.
        for name in values if isinstance(values, dict) else ():
            annotation = cls.model_fields[name].annotation if name in cls.model_fields else None
            if isinstance(values[name], bool) and _is_number(annotation):
                raise ValueError(f"{name} must be a number; found {values[name]} (YAML reads yes, no, on, off so)")
        return values


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
    values = _parse_yaml(text, source=f"{path} is not valid YAML")
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a YAML mapping with sections; found {type(values).__name__}.")
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, schema, source=str(path))


def parse_config(values: Mapping[str, Any], schema: type[C], *, source: str) -> C:
    """Validate plain values; ``source`` names their origin in error messages."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        lines = explain_errors(error, schema)
        if len(lines) == 1:
            raise ConfigError(f"{source}: {lines[0]}") from error
        raise ConfigError("\n  - ".join([f"{source} has {len(lines)} problems:", *lines])) from error


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that ``load_config`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_digest(config: Config) -> str:
    """Return the SHA-256 of the resolved configuration, independent of key order."""
    text = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, but a key given twice in one section is an error, not a silent choice of the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if isinstance(key, Hashable) and key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    "in a section", node.start_mark, f"found the key {key!r} twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one key of nested plain values in place, ``train.steps=100``; the part after ``=`` is YAML."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override!r} is not of the form section.key=value, e.g. --set train.steps=100.")
    value = _parse_yaml(text, source=f"--set {override!r}: the value is not valid YAML")
    node: Any = values
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a section; it cannot hold {parts[-1]!r}.")
    node[parts[-1]] = value


def _parse_yaml(text: str, *, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a safe loader that also refuses repeated keys
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # The library lets what Python makes of a value pass through: ValueError for the date 2020-13-45.
        raise ConfigError(f"{source}: {error}") from error


def _is_number(annotation: Any) -> bool:
    """Tell whether a field holds a number, bounded or optional ones included."""
    return annotation in (int, float) or any(_is_number(argument) for argument in get_args(annotation))
