"""Answers as bytes: whole ones, and the events of streams. Events are put together by hand, as there is one for nearly
every token."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as _quote
from typing import Any

from dsmoe_ray.inference.outputs import FinishReason, SequenceOutput
from dsmoe_ray.inference.sampling_config import SampledToken
from dsmoe_ray.serving.openai_api.errors import ApiError
from dsmoe_ray.serving.openai_api.requests import PlannedCall
from dsmoe_ray.serving.openai_api.served_model import ServedModel
from dsmoe_ray.serving.openai_api.token_texts import CompletionLogprobs, chat_logprobs

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"
PromptOutput = tuple[int, SequenceOutput]
"""Which of a call's prompts it is about, and what came."""


@dataclass(slots=True)
class _Choice:
    """One text of an answer, and what came of it since it was last told."""

    logprobs: CompletionLogprobs
    is_new: bool = True
    """Whether nothing came yet."""
    is_told: bool = False
    num_tokens: int = 0
    texts: list[str] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class AnswerWriter:
    """Writes the answer to one call from what the engine says."""

    def __init__(self, call: PlannedCall, model: ServedModel, *, created_s: int) -> None:
        self._call, self._model = call, model
        self._choices = [_Choice(CompletionLogprobs(model)) for _ in range(call.num_choices)]
        self._kind = "chat.completion" if call.is_chat else "text_completion"
        self._fields = {
            "id": f"{'chatcmpl' if call.is_chat else 'cmpl'}-{call.request_id}",
            "object": self._kind + (".chunk" if call.is_chat and call.stream else ""),
            "created": created_s,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        self._head = f'data: {json.dumps(self._fields, separators=(",", ":"))[:-1]},"choices":['
        self._tail = '],"usage":null}\n\n' if call.include_usage else "]}\n\n"

    @property
    def num_generated_tokens(self) -> int:
        """Return how many tokens came so far."""
        return sum(choice.num_tokens for choice in self._choices)

    def take(self, outputs: Iterable[PromptOutput]) -> list[int]:
        """Take what came; return the numbers of the texts that it belongs to.

        Raises:
            DsmoeError: a sequence has failed.
        """
        touched: dict[int, None] = {}
        for prompt_idx, output in outputs:
            if output.error is not None:
                raise output.error
            idx = prompt_idx * self._call.n + output.sequence_idx
            self._take_one(self._choices[idx], prompt_idx, output)
            touched[idx] = None
        return list(touched)

    def write_events(self, outputs: Iterable[PromptOutput]) -> bytes:
        """Return the events that tell what came: one for each text that there is news of.

        Raises:
            DsmoeError: a sequence has failed.
        """
        write = self._write_chat_choice if self._call.is_chat else self._write_completion_choice
        pieces: list[str] = []
        for idx in self.take(outputs):
            choice = self._choices[idx]
            text = "".join(choice.texts)
            # Text that is held back is told with what comes after it.
            if text or choice.tokens or choice.finish_reason is not None or not choice.is_told:
                pieces += (self._head, write(idx, choice, text), self._tail)
                choice.is_told = True
                choice.texts, choice.tokens = [], []
        return "".join(pieces).encode()

    def write_end(self) -> bytes:
        """Return the last events of a stream."""
        if not self._call.include_usage:
            return DONE
        return f'{self._head}],"usage":{json.dumps(self._usage())}}}\n\n'.encode() + DONE

    def write_whole(self) -> bytes:
        """Return the answer of a call without a stream, when everything came."""
        choices = [self._to_choice(idx, choice) for idx, choice in enumerate(self._choices)]
        return json.dumps(self._fields | {"choices": choices, "usage": self._usage()}).encode()

    def _take_one(self, choice: _Choice, prompt_idx: int, output: SequenceOutput) -> None:
        call, token, text, finish_reason = self._call, output.token, output.text, output.finish_reason
        if choice.is_new and call.echo:
            prompt = call.prompts[prompt_idx]
            choice.texts.append(prompt.text)
            if call.logprobs is not None:
                choice.tokens.append(SampledToken(prompt.request.prompt_ids[0]))
                choice.tokens += output.prompt_logprobs or ()
        choice.is_new = False
        if token is not None:
            choice.num_tokens += 1
            if call.logprobs is not None:
                choice.tokens.append(token)
            if token.token_id in call.told_ends:
                text, finish_reason = "", "stop"
        choice.texts.append(text)
        choice.finish_reason = finish_reason

    def _write_completion_choice(self, idx: int, choice: _Choice, text: str) -> str:
        logprobs = "null" if self._call.logprobs is None else json.dumps(choice.logprobs.to_json(choice.tokens))
        return (
            f'{{"index":{idx},"text":{_quote(text)},"logprobs":{logprobs},'
            f'"finish_reason":{_quote_reason(choice.finish_reason)}}}'
        )

    def _write_chat_choice(self, idx: int, choice: _Choice, text: str) -> str:
        role = "" if choice.is_told else '"role":"assistant",'
        logprobs = "null" if self._call.logprobs is None else json.dumps(chat_logprobs(self._model, choice.tokens))
        return (
            f'{{"index":{idx},"delta":{{{role}"content":{_quote(text)}}},"logprobs":{logprobs},'
            f'"finish_reason":{_quote_reason(choice.finish_reason)}}}'
        )

    def _to_choice(self, idx: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.texts)
        wants_logprobs = self._call.logprobs is not None
        if self._call.is_chat:
            return {
                "index": idx,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": chat_logprobs(self._model, choice.tokens) if wants_logprobs else None,
                "finish_reason": choice.finish_reason,
            }
        return {
            "index": idx,
            "text": text,
            "logprobs": choice.logprobs.to_json(choice.tokens) if wants_logprobs else None,
            "finish_reason": choice.finish_reason,
        }

    def _usage(self) -> dict[str, int]:
        num_prompt_tokens, num_generated = self._call.num_prompt_tokens, self.num_generated_tokens
        return {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt_tokens + num_generated,
        }


def write_error_event(error: ApiError) -> bytes:
    """Return the event that ends a stream which cannot go on."""
    return b"event: error\ndata: " + error.to_json() + b"\n\n"


def list_models(model: ServedModel) -> dict[str, Any]:
    """Return the answer of ``/v1/models``."""
    return {"object": "list", "data": [describe_model(model)]}


def describe_model(model: ServedModel) -> dict[str, Any]:
    """Return the answer of ``/v1/models/{id}``."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "dsmoe_ray",
        "max_model_len": model.config.max_seq_len,
    }


def describe_tokens(model: ServedModel, ids: Sequence[int], *, with_names: bool) -> dict[str, Any]:
    """Return the answer of ``/tokenize``."""
    names = [model.name_token(token_id) for token_id in ids] if with_names else None
    return {"count": len(ids), "max_model_len": model.config.max_seq_len, "tokens": list(ids), "token_strs": names}


def describe_tokenizer(model: ServedModel) -> dict[str, Any]:
    """Return the answer of ``/tokenizer_info``."""
    tokenizer = model.tokenizer
    return {
        "tokenizer_class": type(tokenizer.backend.model).__name__,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": model.config.max_seq_len,
        "eos_token": model.end_of_text,
        "bos_token": None,
        "pad_token": None,
        "unk_token": None,
        "special_tokens": tokenizer.special_ids,
        "chat_template": None if model.chat_template is None else model.chat_template.source,
    }


def _quote_reason(finish_reason: FinishReason | None) -> str:
    return "null" if finish_reason is None else f'"{finish_reason}"'
