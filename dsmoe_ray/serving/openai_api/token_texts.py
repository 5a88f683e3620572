"""Tokens and their log probabilities as answers tell them."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from dsmoe_ray.inference.sampling_config import SampledToken
from dsmoe_ray.serving.openai_api.served_model import ServedModel

_LEAST = -9999.0
"""In place of what JSON cannot tell."""


class CompletionLogprobs:
    """The log probabilities of one text of ``/v1/completions``, and where in the text each token starts."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        # Tokens may hold parts of characters.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def to_json(self, tokens: Iterable[SampledToken]) -> dict[str, Any]:
        """Return what is told of the next tokens of the text."""
        told: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            name = self._model.name_token(token.token_id)
            told["tokens"].append(name)
            told["text_offset"].append(self._num_chars)
            self._num_chars += len(self._decoder.decode(self._model.tokenizer.bytes_of(token.token_id)))
            if token.logprob is None:
                # Nothing stands before a prompt's first token.
                told["token_logprobs"].append(None)
                told["top_logprobs"].append(None)
                continue
            told["token_logprobs"].append(_bound(token.logprob))
            told["top_logprobs"].append(self._to_top(token, name))
        return told

    def _to_top(self, token: SampledToken, name: str) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, logprob in (*token.top_logprobs, (token.token_id, token.logprob)):
            assert logprob is not None
            # Of tokens with one spelling the most likely counts.
            top.setdefault(name if token_id == token.token_id else self._model.name_token(token_id), _bound(logprob))
        return top


def chat_logprobs(model: ServedModel, tokens: Sequence[SampledToken]) -> dict[str, Any]:
    """Return what ``/v1/chat/completions`` tells of tokens."""
    return {
        "content": [
            _to_chat(model, token.token_id, token.logprob)
            | {"top_logprobs": [_to_chat(model, token_id, logprob) for token_id, logprob in token.top_logprobs]}
            for token in tokens
        ],
        "refusal": None,
    }


def _to_chat(model: ServedModel, token_id: int, logprob: float | None) -> dict[str, Any]:
    name = model.name_token(token_id)
    data = model.tokenizer.bytes_of(token_id) or name.encode()
    return {"token": name, "logprob": _bound(logprob), "bytes": list(data)}


def _bound(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)
