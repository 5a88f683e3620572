"""The field ``routing`` of a request: which experts each of its tokens uses.

As on the command line (``"dense"``, ``"top_k=4"``, ``"attention:dense/ffn:threshold=0.5"``), or an object with one rule
for the FFN experts, ``{"k": 4}``, ``{"threshold": 0.5}``, ``{"threshold_top_k": 0.5}``, ``{"top_p": 0.9}``,
``{"per_layer_k": [4, 2]}``, ``{"dense": true}`` (every expert of attention too), or one for each part:
``{"attention": {"dense": true}, "ffn": {"k": 4}}``. A part that is not named runs as deployed.
"""

import functools
import reprlib
from typing import Any

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.inference.routing import DEPLOYED, resolve_routing
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.layer_routing import LayerRouting
from dsmoe_ray.serving.openai_api.errors import ApiError

_RULES = {
    "k": "top_k",
    "threshold": "threshold",
    "threshold_top_k": "threshold_top_k",
    "top_p": "top_p",
    "per_layer_k": "per_layer_top_k",
}
_HELP = (
    'a text such as "top_k=4" or "dense", {"k": 4}, {"threshold": 0.5}, {"threshold_top_k": 0.5}, {"top_p": 0.9}, '
    '{"per_layer_k": [4, 2]}, {"dense": true}, or {"attention": RULE, "ffn": RULE}'
)
_MAX_CHARS = 4000


class RequestRouting:
    """Reads routing for one model; equal wishes give one object, which the engine recognises."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._resolve = functools.lru_cache(maxsize=256)(self._resolve_spec)

    def read(self, value: Any) -> tuple[LayerRouting, ...] | None:
        """Return the rules of each layer; None as the model is deployed.

        Raises:
            ApiError: it is no routing, or impossible with this model.
        """
        spec = DEPLOYED if value is None else value if isinstance(value, str) else _to_spec(value)
        if len(spec) > _MAX_CHARS:
            raise _refuse(f"has {len(spec)} characters; at most {_MAX_CHARS} are allowed.")
        if spec.strip() == DEPLOYED:
            return None
        try:
            return self._resolve(spec)
        except ConfigError as error:
            raise ApiError(str(error), param="routing") from error

    def _resolve_spec(self, spec: str) -> tuple[LayerRouting, ...]:
        return tuple(resolve_routing(spec, self._config))


def _to_spec(value: Any) -> str:
    if not isinstance(value, dict):
        raise _refuse(f"must be {_HELP}; found {reprlib.repr(value)}.")
    if value and value.keys() <= {"attention", "ffn"}:
        return "/".join(f"{part}:{_to_rule(rule)}" for part, rule in value.items())
    return _to_rule(value)


def _to_rule(value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise _refuse(f"must be one rule: {_HELP}; found {reprlib.repr(value)}.")
    [(name, number)] = value.items()
    if name == "dense" and number is True:
        return "dense"
    numbers = number if name == "per_layer_k" and isinstance(number, list) and number else [number]
    if name not in _RULES or not all(type(one) in (int, float) and abs(one) < 1e9 for one in numbers):
        raise _refuse(f"must be one rule: {_HELP}; found {reprlib.repr(value)}.")
    return f"{_RULES[name]}={','.join(map(str, numbers))}"


def _refuse(problem: str) -> ApiError:
    return ApiError(f"routing {problem}", param="routing")
