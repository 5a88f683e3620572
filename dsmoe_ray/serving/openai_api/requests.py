"""From a body to what the engine is asked: one request for each prompt, and what the answer has to tell."""

import dataclasses
import hashlib
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsmoe_ray.errors import RequestError
from dsmoe_ray.inference.requests import MAX_SEQUENCES, GenerationRequest
from dsmoe_ray.inference.sampling_config import SamplingConfig, check_integer
from dsmoe_ray.serving.openai_api.errors import ApiError
from dsmoe_ray.serving.openai_api.messages import read_messages
from dsmoe_ray.serving.openai_api.served_model import ServedModel
from dsmoe_ray.serving.openai_api.types import ChatBody, CompletionBody, GenerationBody

DEFAULT_MAX_TOKENS = 16
"""Of a completion; a chat's answer may fill the model's longest sequence."""
MAX_CHOICES = 1024
"""Texts in one answer."""


@dataclass(frozen=True, kw_only=True)
class PlannedPrompt:
    """One prompt and what the engine is asked for it."""

    request: GenerationRequest
    text: str = ""
    """What an echo starts with."""


@dataclass(frozen=True, kw_only=True)
class PlannedCall:
    """One call of the API, ready to run."""

    request_id: str
    is_chat: bool
    prompts: Sequence[PlannedPrompt]
    n: int
    """Texts for each prompt."""
    stream: bool
    include_usage: bool
    echo: bool = False
    logprobs: int | None = None
    told_ends: frozenset[int] = frozenset()
    """Tokens that end a text and are told with their log probability all the same."""

    @property
    def num_choices(self) -> int:
        """Return how many texts there are in the answer."""
        return len(self.prompts) * self.n

    @property
    def num_prompt_tokens(self) -> int:
        """Return how many tokens the prompts have."""
        return sum(len(prompt.request.prompt_ids) for prompt in self.prompts)

    def count_tokens(self, model: ServedModel) -> int:
        """Return the most tokens that its sequences can have, prompts included."""
        return self.n * sum(prompt.request.compute_max_len(model.config) for prompt in self.prompts)


class Planner:
    """Reads bodies for one model."""

    def __init__(self, model: ServedModel, *, max_prompts: int) -> None:
        self._model, self._max_prompts = model, max_prompts

    def plan_completion(self, body: CompletionBody, request_id: str) -> PlannedCall:
        """Return what a body of ``/v1/completions`` asks for.

        Raises:
            ApiError: a field cannot be.
            RequestError: likewise.
        """
        self._check_model(body)
        if body.best_of is not None and body.best_of != body.n:
            raise ApiError(
                f"best_of={body.best_of} is not supported: every text of n={body.n} is returned. Leave best_of out.",
                param="best_of",
                code="unsupported_parameter",
            )
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        check_integer("max_tokens", max_tokens, low=0 if body.echo else 1)
        wanted = self._read_common(body, logprobs=body.logprobs)
        prompts = self._split_prompts(body)
        # Scores of a prompt and one token more: the harness of lm_eval counts on that token, even if it ends the text.
        tells_end = body.echo and body.logprobs is not None and max_tokens == 1
        ends = frozenset((*body.stop_token_ids, *(() if body.ignore_eos else self._model.tokenizer.end_ids)))
        if tells_end:
            wanted |= {"ignore_eos": True, "stop_token_ids": ()}
        if body.echo and (body.logprobs is not None or max_tokens == 0):
            wanted["prompt_logprobs"] = body.logprobs or 0
        planned = []
        for idx, prompt in enumerate(prompts):
            ids = self._read_prompt(prompt, room=self._model.config.max_seq_len - min(max_tokens, 1))
            seed = derive_request_seed(request_id, idx) if body.seed is None else body.seed
            request = self._make_request(wanted, ids, max_tokens=max_tokens, seed=seed)
            text = prompt if isinstance(prompt, str) else self._model.tokenizer.decode(ids)
            planned.append(PlannedPrompt(request=request, text=text if body.echo else ""))
        return PlannedCall(
            request_id=request_id,
            is_chat=False,
            prompts=planned,
            n=body.n,
            stream=body.stream,
            include_usage=_wants_usage(body),
            echo=body.echo,
            logprobs=body.logprobs,
            told_ends=ends if tells_end else frozenset(),
        )

    def plan_chat(self, body: ChatBody, request_id: str) -> PlannedCall:
        """Return what a body of ``/v1/chat/completions`` asks for.

        Raises:
            ApiError: a field cannot be, or the model has no chat template.
            RequestError: likewise.
        """
        self._check_model(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError("top_logprobs needs logprobs: true. Add it, or leave both out.", param="top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        ids = self.encode_messages(body.messages, add_generation_prompt=body.add_generation_prompt)
        longest = self._model.config.max_seq_len
        if len(ids) >= longest:
            raise _refuse_length("messages", f"has {len(ids)}", room=longest - 1)
        max_tokens = _read_chat_max_tokens(body, room=longest - len(ids))
        seed = derive_request_seed(request_id, 0) if body.seed is None else body.seed
        wanted = self._read_common(body, logprobs=logprobs)
        request = self._make_request(wanted, ids, max_tokens=max_tokens, seed=seed)
        return PlannedCall(
            request_id=request_id,
            is_chat=True,
            prompts=[PlannedPrompt(request=request)],
            n=body.n,
            stream=body.stream,
            include_usage=_wants_usage(body),
            logprobs=logprobs,
        )

    def encode_messages(self, messages: Sequence[Any], *, add_generation_prompt: bool) -> list[int]:
        """Return the tokens of a conversation.

        Raises:
            ApiError: a message cannot be, or the model has no chat template.
            RequestError: the template does not take these messages.
        """
        if self._model.chat_template is None:
            raise ApiError(
                f"the model {self._model.name!r} has no chat template, so it does not know conversations. "
                "Use /v1/completions, or publish chat_template.jinja with the artifact.",
                param="messages",
                code="no_chat_template",
            )
        return self._model.chat_template.encode(read_messages(messages), add_generation_prompt=add_generation_prompt)

    def check_model_name(self, name: str | None) -> None:
        """Raise ``ApiError`` if another model is asked for."""
        if name is not None and name != self._model.name:
            raise ApiError(
                f"the model {name[:200]!r} is not served here; {self._model.name!r} is.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def _check_model(self, body: GenerationBody) -> None:
        self.check_model_name(body.model)
        check_integer("n", body.n, low=1, high=MAX_SEQUENCES)
        if body.stream_options is not None and not body.stream:
            raise ApiError("stream_options needs stream: true. Add it, or leave both out.", param="stream_options")

    def _split_prompts(self, body: CompletionBody) -> list[Any]:
        many = _split_prompts(body.prompt)
        if len(many) > self._max_prompts:
            raise ApiError(
                f"prompt has {len(many)} prompts; at most {self._max_prompts} are allowed in one call.", param="prompt"
            )
        if body.n * len(many) > MAX_CHOICES:
            raise ApiError(
                f"n={body.n} texts for {len(many)} prompts are {body.n * len(many)}; at most {MAX_CHOICES} are allowed "
                "in one call.",
                param="n",
            )
        return many

    def _read_prompt(self, prompt: str | list[int], *, room: int) -> list[int]:
        """Return the tokens of a prompt; one that is far too long costs nothing."""
        at_least = self._model.count_tokens_at_least(prompt) if isinstance(prompt, str) else len(prompt)
        if at_least > room:
            raise _refuse_length("prompt", f"has at least {at_least}", room=room)
        if isinstance(prompt, str):
            ids = self._model.encode(prompt)
            if len(ids) > room:
                raise _refuse_length("prompt", f"has {len(ids)}", room=room)
            return ids
        self._model.check_ids(prompt, param="prompt")
        return prompt

    def _read_common(self, body: GenerationBody, *, logprobs: int | None) -> dict[str, Any]:
        """Return the fields of ``GenerationRequest`` that all prompts have in common."""
        sampling = self._model.sampling_defaults | _read_sampling(body) | {"logprobs": logprobs}
        if sampling.get("top_k") is not None:
            # No more than there are, which is what any larger number means.
            sampling["top_k"] = min(sampling["top_k"], self._model.config.vocab_size)
        return {
            "sampling": SamplingConfig(**sampling, seed=body.seed or 0),
            "n": body.n,
            "stop": _read_stop(body.stop),
            "include_stop_in_output": body.include_stop_str_in_output,
            "stop_token_ids": tuple(dict.fromkeys(body.stop_token_ids)),
            "ignore_eos": body.ignore_eos,
            "routing": self._model.routing.read(body.routing),
        }

    def _make_request(
        self, wanted: Mapping[str, Any], prompt_ids: Sequence[int], *, max_tokens: int, seed: int
    ) -> GenerationRequest:
        sampling = dataclasses.replace(wanted["sampling"], seed=seed)
        # The longest sequence ends a text anyway.
        num_wanted = min(max_tokens, self._model.config.max_seq_len)
        request = GenerationRequest(
            **(dict(wanted) | {"prompt_ids": prompt_ids, "max_tokens": num_wanted, "sampling": sampling})
        )
        request.check_against(self._model.config)
        return request


def derive_request_seed(request_id: str, prompt_idx: int) -> int:
    """Return the seed of a prompt whose call names none: the same call with the same id has the same tokens."""
    digest = hashlib.blake2b(f"{request_id}:{prompt_idx}".encode(), digest_size=8, person=b"dsmoe-request").digest()
    return int.from_bytes(digest, "big") >> 1


def _wants_usage(body: GenerationBody) -> bool:
    return body.stream_options is not None and body.stream_options.include_usage


def _split_prompts(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(one) is int for one in value):
            return [value]
        if all(isinstance(one, str) for one in value) or all(isinstance(one, list) for one in value):
            return value
    raise ApiError(
        "prompt must be a text, a list of texts, a list of token ids, or a list of such lists; found "
        f"{reprlib.repr(value)}.",
        param="prompt",
    )


def _refuse_length(param: str, found: str, *, room: int) -> ApiError:
    return ApiError(
        f"{param} {found} tokens; this model takes at most {room} and one or more of its own. Shorten {param}.",
        param=param,
        code="context_length_exceeded",
    )


def _read_chat_max_tokens(body: ChatBody, *, room: int) -> int:
    given = [value for value in (body.max_completion_tokens, body.max_tokens) if value is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise ApiError(
            f"max_tokens={body.max_tokens} and max_completion_tokens={body.max_completion_tokens} differ. Keep the "
            "latter.",
            param="max_tokens",
        )
    if not given:
        return room
    check_integer("max_tokens" if body.max_completion_tokens is None else "max_completion_tokens", given[0], low=1)
    return given[0]


def _read_stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ApiError(f"stop must be a string or a list of strings; found {reprlib.repr(value)}.", param="stop")
    return texts


def _read_sampling(body: GenerationBody) -> dict[str, Any]:
    optional = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    sampling: dict[str, Any] = {name: getattr(body, name) for name in optional if getattr(body, name) is not None}
    if sampling.get("top_k") in (0, -1):
        sampling["top_k"] = None
    sampling["presence_penalty"] = body.presence_penalty
    sampling["frequency_penalty"] = body.frequency_penalty
    sampling["logit_bias"] = {_read_token_id(name): bias for name, bias in body.logit_bias.items()}
    return sampling


def _read_token_id(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) < 10):
        raise RequestError(f"logit_bias has the key {name[:100]!r}, which is no token id.", param="logit_bias")
    return int(name)
