"""Bodies of requests: which fields there are, and of which kind; the engine's own types check their ranges.

A field that is null counts as absent. Fields of OpenAI's API that we do not serve are refused unless they ask for
nothing; unknown ones are refused with the nearest name. Fields that several kinds of values fit, as ``prompt``, are
read in ``requests.py`` and ``messages.py``.
"""

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsmoe_ray.serving.openai_api.errors import ApiError

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}
# Bookkeeping of those who ask; makes no difference to the answer.
_IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier")


class Body(BaseModel):
    """Base of all bodies: fields have exactly the kinds that are named, as JSON has them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields that are not served, with the values that ask for nothing."""


class StreamOptions(Body):
    """What a stream carries besides text."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (True, False)}

    include_usage: bool = False


class GenerationBody(Body):
    """What both ways to ask for text have in common; see ``inference/sampling_config.py`` and ``requests.py`` there."""

    model: str | None = None
    max_tokens: int | None = None
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    """0 and -1 are all tokens."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] = Field(default_factory=dict)
    seed: int | None = None
    stop: Any = None
    """A string or a list of strings."""
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    routing: Any = None
    """Which experts each token uses: a setting as on the command line, or an object; see ``routing.py``."""


class CompletionBody(GenerationBody):
    """``POST /v1/completions``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {"suffix": ("",)}

    prompt: Any = None
    """A text, token ids, or a list of either."""
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None


class ChatBody(GenerationBody):
    """``POST /v1/chat/completions``."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "parallel_tool_calls": (True, False),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    """Whether the template opens the answer."""


class TokenizeBody(Body):
    """``POST /tokenize``: a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    """Makes no difference: a text has no token that it does not spell."""
    parse_special: bool | None = None
    """Whether names of special tokens in the prompt are those tokens. By default only a prompt that is nothing but one
    name is, so that its id can be asked for."""
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]


B = TypeVar("B", bound=Body)


def parse_body(data: bytes | bytearray, schema: type[B]) -> B:
    """Read the JSON of a request.

    Raises:
        ApiError: it is none, or does not fit the schema; names the field.
    """
    try:
        values = pydantic_core.from_json(bytes(data), allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"the body is not valid JSON: {error}.", code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(f"the body must be a JSON object; found {_name_kind(values)}.", code="invalid_json")
    try:
        return schema.model_validate(_drop_what_asks_for_nothing(values, schema))
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0], schema) from error


def _drop_what_asks_for_nothing(values: dict[str, Any], schema: type[Body]) -> dict[str, Any]:
    kept = {}
    for name, value in values.items():
        if value is None or (name in _IGNORED and issubclass(schema, GenerationBody)):
            continue
        if name in schema.harmless:
            if value not in schema.harmless[name]:
                raise ApiError(
                    f"{name}={reprlib.repr(value)} is not supported here. Leave it out.",
                    param=name,
                    code="unsupported_parameter",
                )
            continue
        is_section = name == "stream_options" and isinstance(value, dict)
        kept[name] = _drop_what_asks_for_nothing(value, StreamOptions) if is_section else value
    return kept


def _explain(item: Any, schema: type[Body]) -> ApiError:
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])[1:]
    if item["type"] == "extra_forbidden":
        allowed = schema.model_fields if len(item["loc"]) == 1 else StreamOptions.model_fields
        nearest = difflib.get_close_matches(str(item["loc"][-1]), list(allowed), n=1, cutoff=0.6)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "leave it out."
        return ApiError(f"{param[:100]}: unknown field; {hint}", param=param[:100], code="unknown_parameter")
    if item["type"] == "missing":
        return ApiError(f"{param}: required and not given.", param=param, code="missing_required_parameter")
    expected = _EXPECTED.get(item["type"])
    wanted = f"must be {expected}" if expected else item["msg"][0].lower() + item["msg"][1:]
    return ApiError(f"{param[:100]}: {wanted}; found {reprlib.repr(item['input'])}.", param=param[:100])


def _name_kind(value: Any) -> str:
    return {str: "a string", list: "a list", bool: "true or false"}.get(type(value), "a number" if value else "null")
