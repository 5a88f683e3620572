"""What a person is told when a configuration does not fit its schema.

Turns pydantic's errors into one line each: which key, what was found, what is allowed, what to change. Knows pydantic
models only by their fields; a union's tag, which pydantic puts into its locations, is left out of the key.
"""

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

Location = tuple[int | str, ...]

# In place of "Input should be ..." for types whose name in pydantic says little to a writer of YAML.
_EXPECTED = {
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list, like [a, b]",
    "tuple_type": "a list, like [a, b]",
    "too_short": "a longer list",
    "too_long": "a shorter list",
}


def explain_errors(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """Return one line for each mistake, without those that only follow from another."""
    items = error.errors(include_url=False)
    misspelt: dict[Location, str] = {}
    for item in items:
        if item["type"] == "extra_forbidden":
            *section, key = item["loc"]
            nearest = _nearest(str(key), _names_at(schema, tuple(section)))
            if nearest is not None:
                misspelt[(*section, nearest)] = str(key)
    # A misspelt required key is reported once, as the unknown key that it is.
    return [_explain(item, schema) for item in items if not (item["type"] == "missing" and item["loc"] in misspelt)]


def _explain(item: Any, schema: type[BaseModel]) -> str:
    location: Location = item["loc"]
    where, kind = to_key(location, schema), item["type"]
    if kind == "value_error":
        # A check across sections has no place of its own; its message names the keys.
        return f"{where}: {item['ctx']['error']}" if where else str(item["ctx"]["error"])
    if kind == "extra_forbidden":
        return f"{where}: unknown key; {_hint_for_unknown(location, schema)}"
    if kind == "missing":
        # A list's entry has a number for a key, which --set cannot name.
        change = "the list is too short" if isinstance(location[-1], int) else _how_to_add(where)
        return f"{where}: required and not given; {change}"
    if kind in ("literal_error", "enum", "union_tag_invalid", "union_tag_not_found"):
        return _explain_choice(item, where, schema)
    message = item["msg"].replace("Input should", "must").replace("should", "must")
    message = f"must be {_EXPECTED[kind]}" if kind in _EXPECTED else message[0].lower() + message[1:]
    return f"{where or 'the config'}: {message}; found {reprlib.repr(item['input'])}"


def _explain_choice(item: Any, where: str, schema: type[BaseModel]) -> str:
    if item["type"] in ("literal_error", "enum"):
        allowed = [part.strip(" '") for part in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{where}: {_not_one_of(item['input'], allowed)}"
    tags = sorted(_tags_at(schema, item["loc"]))
    if item["type"] == "union_tag_not_found":
        return f"{where}.kind: required and not given; it is one of {', '.join(tags)}"
    return f"{where}.kind: {_not_one_of(item['ctx']['tag'], tags)}"


def _how_to_add(where: str) -> str:
    return f"add it to the file or pass --set {where}=VALUE"


def to_key(location: Sequence[int | str], schema: type[BaseModel]) -> str:
    """Return a location as a person writes it, ``model.ffn.num_experts`` or ``data.paths[0]``."""
    key = ""
    for part, is_tag in _walk(tuple(location), schema):
        if isinstance(part, int):
            key += f"[{part}]"
        elif not is_tag:
            key += f".{part}" if key else part
    return key


def _hint_for_unknown(location: Location, schema: type[BaseModel]) -> str:
    *section, name = location
    allowed = _names_at(schema, tuple(section))
    nearest = _nearest(str(name), allowed)
    if nearest is not None:
        return f"did you mean {nearest!r}?"
    elsewhere = [path for path in _all_keys(schema) if path.rsplit(".", 1)[-1] == name]
    if elsewhere:
        return f"did you mean {' or '.join(map(repr, dict.fromkeys(elsewhere[:3])))}?"
    return f"allowed here: {', '.join(sorted(allowed)) or 'nothing'}"


def _not_one_of(found: object, allowed: Sequence[str]) -> str:
    nearest = _nearest(str(found), allowed)
    hint = f"; did you mean {nearest!r}?" if nearest is not None else ""
    return f"must be one of {', '.join(allowed)}; found {reprlib.repr(found)}{hint}"


def _nearest(name: str, allowed: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)), None)


def _names_at(schema: type[BaseModel], location: Location) -> list[str]:
    """Return the keys allowed in a section."""
    models = _models_at(schema, location)
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _tags_at(schema: type[BaseModel], location: Location) -> list[str]:
    return [tag for model in _models_at(schema, location) if (tag := _tag(model)) is not None]


def _models_at(schema: type[BaseModel], location: Location) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = [schema]
    for part in location:
        models = _step(models, part)[0]
    return models


def _walk(location: Location, schema: type[BaseModel]) -> Iterator[tuple[int | str, bool]]:
    models: list[type[BaseModel]] = [schema]
    for part in location:
        models, is_tag = _step(models, part)
        yield part, is_tag


def _step(models: list[type[BaseModel]], part: int | str) -> tuple[list[type[BaseModel]], bool]:
    """Go one part down a location; the second value tells whether the part was a union's tag."""
    tagged = [model for model in models if _tag(model) == part]
    if tagged and not any(part in model.model_fields for model in models):
        return tagged, True
    fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
    return [found for field in fields for found in _models_in(field.annotation)], False


def _all_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for model in _models_in(field.annotation):
            yield from _all_keys(model, f"{prefix}{name}.")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if get_origin(annotation) in (Union, UnionType) or get_args(annotation):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    values = get_args(field.annotation)
    # A choice between kinds inside one model is an ordinary field, not the tag of a union.
    return str(values[0]) if len(values) == 1 else None
