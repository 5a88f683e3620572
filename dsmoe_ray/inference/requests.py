"""What a caller asks of the engine, and why a request may be refused. Pure data.

A request is checked when it is made, for what is wrong whatever the model, and by ``check_against`` for what this model
cannot do. A refused request is a ``RequestError`` that names the field; nothing has run for it then.
"""

import dataclasses
import operator
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from dsmoe_ray.errors import RequestError
from dsmoe_ray.inference.sampling_config import GREEDY, MAX_LOGPROBS, SamplingConfig, check_integer, show_number
from dsmoe_ray.inference.seeds import derive_seed
from dsmoe_ray.model.config import (
    AttentionConfig,
    FfnConfig,
    MoaConfig,
    ModelConfig,
    MoeConfig,
    RoutingConfig,
    RoutingMode,
)
from dsmoe_ray.model.layer_routing import LayerRouting

MAX_SEQUENCES = 128
"""Most continuations of one prompt in one request."""
MAX_STOP_STRINGS = 32
MAX_STOP_CHARS = 1000
"""Of one stop string."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt and how to continue it; checked when made, and its seed drawn if it has none.

    Raises:
        RequestError: a field is impossible; its ``param`` is the field's name.
    """

    prompt_ids: Sequence[int]
    max_tokens: int
    """Most tokens to generate, ``generated_ids`` included; 0 only to get the prompt's log probabilities."""
    n: int = 1
    """Continuations of the prompt, each with its own seed; see ``seed_of``."""
    sampling: SamplingConfig = GREEDY
    stop: Sequence[str] = ()
    """The text ends before the first of these strings that is complete."""
    include_stop_in_output: bool = False
    """Whether the text ends after that string instead."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the sequence besides the end-of-text token; they have no part in the text."""
    ignore_eos: bool = False
    """Whether the end-of-text token is a token like any other."""
    routing: Sequence[LayerRouting] | None = None
    """Rules of each layer, see ``inference/routing.py``; None as the model is deployed."""
    prompt_logprobs: int | None = None
    """As ``sampling.logprobs``, for the tokens of the prompt after the first."""
    generated_ids: Sequence[int] = ()
    """Tokens that the same request has generated elsewhere; the sequence goes on after them."""

    def __post_init__(self) -> None:
        check_integer("n", self.n, low=1, high=MAX_SEQUENCES)
        check_integer("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        check_integer("max_tokens", self.max_tokens, low=1 if self.prompt_logprobs is None else 0)
        values: dict[str, Any] = {
            name: _to_ids(name, getattr(self, name)) for name in ("prompt_ids", "stop_token_ids", "generated_ids")
        }
        values["stop"] = _check_stop(self.stop)
        values["routing"] = None if self.routing is None else _to_rules(self.routing)
        if not isinstance(self.sampling, SamplingConfig):
            raise RequestError(f"sampling must be a SamplingConfig; found {self.sampling!r}", param="sampling")
        if self.sampling.seed is None:
            # Drawn once and kept, so that the request can be continued elsewhere.
            values["sampling"] = dataclasses.replace(self.sampling, seed=secrets.randbits(63))
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_lengths()

    def seed_of(self, sequence_idx: int) -> int:
        """Return the seed of one of the ``n`` sequences; the first has the request's own."""
        assert self.sampling.seed is not None, "drawn when the request was made"
        return derive_seed(self.sampling.seed, sequence_idx)

    def continue_sequence(self, sequence_idx: int, generated_ids: Sequence[int]) -> Self:
        """Return the request for the rest of one sequence: it goes on with the tokens it would have had here.

        Its generated text is one text: stop strings, penalties and ``max_tokens`` count what was generated already. The
        prompt's log probabilities come before any token, so they are not asked for again once there is one.

        Raises:
            RequestError: nothing is left to generate.
        """
        return dataclasses.replace(
            self,
            n=1,
            sampling=dataclasses.replace(self.sampling, seed=self.seed_of(sequence_idx)),
            generated_ids=generated_ids,
            prompt_logprobs=None if generated_ids else self.prompt_logprobs,
        )

    def compute_max_len(self, config: ModelConfig) -> int:
        """Return how many tokens a sequence has at most, prompt included: the model's longest may come first."""
        return min(len(self.prompt_ids) + self.max_tokens, config.max_seq_len)

    def check_against(self, config: ModelConfig) -> None:
        """Raise ``RequestError`` if this model cannot serve the request."""
        _check_vocabulary(self, config.vocab_size)
        _check_room(self, config.max_seq_len)
        if self.routing is not None:
            _check_routing(self.routing, config)

    def _check_lengths(self) -> None:
        if not self.prompt_ids:
            raise RequestError("the prompt is empty. Give some text to continue.", param="prompt_ids")
        if self.generated_ids and self.n > 1:
            raise RequestError(
                f"a request with generated_ids continues one sequence; found n={self.n}. Set n to 1.", param="n"
            )
        if self.generated_ids and len(self.generated_ids) >= self.max_tokens:
            raise RequestError(
                f"{len(self.generated_ids)} tokens were generated already and max_tokens is {self.max_tokens}: nothing "
                "is left to generate. Raise max_tokens or take what there is.",
                param="generated_ids",
            )


def _to_ids(name: str, ids: Iterable[Any]) -> tuple[int, ...]:
    try:
        return tuple(map(operator.index, ids))
    except TypeError as error:
        raise RequestError(f"{name} must be a list of token ids: {error}", param=name) from error


def _is_list_of(kind: type, values: Any) -> bool:
    # A string is a sequence of strings, but none of strings that end a text.
    return isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(one, kind) for one in values)


def _to_rules(routing: Sequence[LayerRouting]) -> tuple[LayerRouting, ...]:
    # Rules of one layer are a tuple too.
    if isinstance(routing, LayerRouting) or not _is_list_of(LayerRouting, routing):
        raise RequestError(f"routing must be a list of LayerRouting, one a layer; found {routing!r}", param="routing")
    for layer, rules in enumerate(routing):
        if not _is_list_of(RoutingConfig, rules):
            raise RequestError(f"routing of layer {layer} must hold routing rules; found {rules!r}", param="routing")
    return tuple(routing)


def _check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    if not _is_list_of(str, stop):
        raise RequestError(f"stop must be a list of strings; found {stop!r}", param="stop")
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(stop)} strings; at most {MAX_STOP_STRINGS} are allowed", param="stop")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise RequestError(
                f"a stop string must have 1 to {MAX_STOP_CHARS} characters; found {len(text)}", param="stop"
            )
    return tuple(stop)


def _check_vocabulary(request: GenerationRequest, vocab_size: int) -> None:
    named = {
        "prompt_ids": ("the prompt", request.prompt_ids),
        "generated_ids": ("generated_ids", request.generated_ids),
        "stop_token_ids": ("stop_token_ids", request.stop_token_ids),
        "logit_bias": ("logit_bias", tuple(request.sampling.logit_bias)),
    }
    for param, (name, ids) in named.items():
        if ids and not (0 <= min(ids) and max(ids) < vocab_size):
            foreign = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
            raise RequestError(
                f"{name} has the token id {show_number(foreign)}; this model's ids are 0 to {vocab_size - 1}.",
                param=param,
            )
    for param, wanted in (("logprobs", request.sampling.logprobs), ("prompt_logprobs", request.prompt_logprobs)):
        if wanted is not None and wanted > vocab_size:
            raise RequestError(f"{param}={wanted}, but this model has only {vocab_size} tokens.", param=param)


def _check_room(request: GenerationRequest, max_seq_len: int) -> None:
    room = max_seq_len - 1 if request.max_tokens else max_seq_len
    num_tokens = len(request.prompt_ids) + len(request.generated_ids)
    if num_tokens <= room:
        return
    leaves = "which leaves one to generate of its" if request.max_tokens else "its"
    found = f"the prompt has {len(request.prompt_ids)} tokens"
    if request.generated_ids:
        found += f" and {len(request.generated_ids)} were generated already"
    raise RequestError(
        f"{found}; this model takes at most {room}, {leaves} longest sequence of {max_seq_len}. Shorten the prompt.",
        param="prompt_ids",
    )


def _check_routing(routing: Sequence[LayerRouting], config: ModelConfig) -> None:
    if len(routing) != config.num_layers:
        raise RequestError(
            f"routing has rules for {len(routing)} layers; this model has {config.num_layers}.", param="routing"
        )
    for layer, rules in enumerate(routing):
        for part, rule in rules._asdict().items():
            _check_rule(rule, getattr(config, part), where=f"routing of layer {layer}, {part}")


def _check_rule(rule: RoutingConfig, mixture: AttentionConfig | FfnConfig, *, where: str) -> None:
    if rule.mode is RoutingMode.PER_LAYER_TOP_K:
        raise RequestError(f"{where}: a table is the rule of all layers; give this layer's top_k.", param="routing")
    if not isinstance(mixture, MoaConfig | MoeConfig):
        if rule.mode is not RoutingMode.DENSE:
            raise RequestError(f"{where}: this model has no experts to choose from there. Use dense.", param="routing")
        return
    try:
        rule.check_against(mixture.num_experts)
    except ValueError as error:
        raise RequestError(f"{where}: {error}", param="routing") from error
