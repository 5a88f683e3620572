"""Between messages of the gRPC API and what a gateway knows: calls on the way in, outputs on the way out."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.sampling_config import SampledToken
from dsmoe_ray.serving import grpc_messages as messages
from dsmoe_ray.serving.openai_api.errors import ApiError
from dsmoe_ray.serving.openai_api.requests import PlannedCall, Planner
from dsmoe_ray.serving.openai_api.types import CompletionBody

# Of the same name and meaning in both APIs; those that the schema calls optional are absent unless they are given.
_OPTIONAL = (*("max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logprobs"),)
_PLAIN = ("presence_penalty", "frequency_penalty", "include_stop_str_in_output", "ignore_eos")


def plan_call(planner: Planner, request: Any, request_id: str) -> PlannedCall:
    """Return what a ``GenerateRequest`` asks for.

    Raises:
        ApiError: a field cannot be.
        RequestError: likewise.
    """
    values: dict[str, Any] = {name: getattr(request, name) for name in _PLAIN}
    values |= {name: getattr(request, name) for name in _OPTIONAL if request.HasField(name)}
    values |= {
        "prompt": _read_prompt(request),
        "stop": list(request.stop),
        "stop_token_ids": list(request.stop_token_ids),
        "logit_bias": {str(token_id): bias for token_id, bias in request.logit_bias.items()},
        "stream": True,
        # An echo is how the other API asks for scores of the prompt alone.
        "echo": request.score_prompt and values.get("max_tokens") == 0,
    }
    values |= {name: getattr(request, name) for name in ("model", "routing") if getattr(request, name)}
    call = planner.plan_completion(CompletionBody(**values), request_id)
    if not request.score_prompt:
        return call
    scored = [
        dataclasses.replace(prompt, request=dataclasses.replace(prompt.request, prompt_logprobs=call.logprobs or 0))
        for prompt in call.prompts
    ]
    return dataclasses.replace(call, prompts=scored)


def to_reply(outputs: Iterable[SequenceOutput]) -> Any:
    """Return outputs as one ``GenerateReply``.

    Raises:
        DsmoeError: a sequence failed.
    """
    return messages.GenerateReply(outputs=[_to_output(output) for output in outputs])


def _read_prompt(request: Any) -> Any:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise ApiError("the prompt is missing. Set text or token_ids.", param="prompt")
    return request.text if kind == "text" else list(request.token_ids.ids)


def _to_output(output: SequenceOutput) -> Any:
    if output.error is not None:
        raise output.error
    told = messages.SequenceOutput(sequence=output.sequence_idx, text=output.text)
    if output.token is not None:
        told.token_id = output.token.token_id
        if output.token.logprob is not None:
            told.logprob = output.token.logprob
            told.top_logprobs.extend(_to_pairs(output.token))
    if output.prompt_logprobs is not None:
        told.prompt_logprobs.extend(
            messages.ScoredToken(token_id=score.token_id, logprob=score.logprob, top_logprobs=_to_pairs(score))
            for score in output.prompt_logprobs
        )
    told.finish_reason = messages.FINISH_REASONS[output.finish_reason]
    if isinstance(output.stop_reason, str):
        told.stop_string = output.stop_reason
    elif output.stop_reason is not None:
        told.stop_token_id = output.stop_reason
    return told


def _to_pairs(token: SampledToken) -> list[Any]:
    return [messages.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in token.top_logprobs]
