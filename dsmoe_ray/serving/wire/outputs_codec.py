"""What a step added to many sequences, as one frame and back: the one frame that travels after every step.

Columns of ids, token ids and texts, and beside them the rest of those few outputs that have more to tell: the end of a
sequence, log probabilities. A prompt's log probabilities are raw payloads, as they can be long.

Shape letters: P tokens of a prompt after the first, K log probabilities told for each.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from dsmoe_ray.errors import DsmoeError, ExpertUnavailableError, FrameError
from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.sampling_config import SampledToken
from dsmoe_ray.serving.wire.connection import Buffer, Frame
from dsmoe_ray.serving.wire.frame_fields import FrameFields
from dsmoe_ray.serving.wire.messages import Kind, OutputsMessage

_NAME = "OUTPUTS"
_NO_TOKEN = -1
_FINISH_REASONS = ("stop", "length", "error")
_ERRORS: dict[str, type[DsmoeError]] = {"error": DsmoeError, "expert_unavailable": ExpertUnavailableError}
_NUM_PROMPT_PAYLOADS = 4


def outputs_to_frame(message: OutputsMessage) -> Frame:
    """Return the outputs of a step as they travel."""
    return pack_outputs([output.request_id for output in message.outputs], message.outputs)


def pack_outputs(ids: Sequence[Hashable], outputs: Sequence[SequenceOutput]) -> Frame:
    """Return outputs as they travel, with other request ids than those that they hold."""
    payloads: list[Buffer] = []
    header = {
        "ids": ids,
        "sequences": [output.sequence_idx for output in outputs],
        "tokens": [_NO_TOKEN if output.token is None else output.token.token_id for output in outputs],
        "texts": [output.text for output in outputs],
        "more": [
            [idx, _more_of(output, payloads)]
            for idx, output in enumerate(outputs)
            if output.finish_reason is not None
            or output.prompt_logprobs is not None
            or (output.token is not None and output.token.logprob is not None)
        ],
    }
    return Frame(Kind.OUTPUTS, header, payloads)


def outputs_from_frame(frame: Frame) -> OutputsMessage:
    """Return the outputs of a step that came.

    Raises:
        FrameError: it is not what it should be; names the field.
    """
    fields = FrameFields(frame, _NAME)
    ids = fields.texts("ids")
    size = len(ids)
    columns = (
        ids,
        fields.integers("sequences", size=size, low=0),
        fields.integers("tokens", size=size, low=_NO_TOKEN),
        fields.texts("texts", size=size),
    )
    more: dict[int, Mapping[str, Any]] = {}
    for pair in fields.items("more"):
        if (
            not _is_pair(pair)
            or type(pair[0]) is not int
            or not 0 <= pair[0] < size
            or not isinstance(pair[1], Mapping)
        ):
            raise fields.error("more", "pairs of a place and fields", pair)
        more[pair[0]] = pair[1]
    return OutputsMessage(
        outputs=tuple(
            SequenceOutput(
                request_id=request_id,
                sequence_idx=sequence_idx,
                token=None if token_id == _NO_TOKEN else SampledToken(token_id),
                text=text,
            )
            if idx not in more
            else _read_full(Frame(Kind.OUTPUTS, more[idx], frame.payloads), request_id, sequence_idx, token_id, text)
            for idx, (request_id, sequence_idx, token_id, text) in enumerate(zip(*columns, strict=True))
        )
    )


def _more_of(output: SequenceOutput, payloads: list[Buffer]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if output.token is not None and output.token.logprob is not None:
        more["logprob"] = output.token.logprob
        more["top"] = [list(pair) for pair in output.token.top_logprobs]
    if output.finish_reason is not None:
        more["finish"], more["stop"] = output.finish_reason, output.stop_reason
    if output.error is not None:
        code = "expert_unavailable" if isinstance(output.error, ExpertUnavailableError) else "error"
        more["error"] = [code, str(output.error)]
    if output.prompt_logprobs is not None:
        more["prompt"] = len(payloads)
        payloads += _scores_to_payloads(output.prompt_logprobs)
    return more


def _read_full(more: Frame, request_id: str, sequence_idx: int, token_id: int, text: str) -> SequenceOutput:
    """Return an output that has more to tell than its token and text."""
    fields, values = FrameFields(more, _NAME), more.header
    token = None
    if token_id != _NO_TOKEN:
        token = SampledToken(token_id)
        if "logprob" in values:
            token = SampledToken(token_id, _check_float(fields, "logprob", values["logprob"]), _read_top(fields))
    stop_reason = values.get("stop")
    if stop_reason is not None and not (isinstance(stop_reason, str) or type(stop_reason) is int):
        raise fields.error("stop", "a string or a token id", stop_reason)
    return SequenceOutput(
        request_id=request_id,
        sequence_idx=sequence_idx,
        token=token,
        text=text,
        prompt_logprobs=_read_scores(more) if "prompt" in values else None,
        finish_reason=fields.choice("finish", _FINISH_REASONS) if "finish" in values else None,  # type: ignore[arg-type]
        stop_reason=stop_reason,
        error=_read_error(fields) if "error" in values else None,
    )


def _read_top(fields: FrameFields) -> tuple[tuple[int, float], ...]:
    top = fields.items("top")
    if not all(_is_pair(pair) and type(pair[0]) is int for pair in top):
        raise fields.error("top", "pairs of a token id and its log probability", top)
    return tuple((token_id, _check_float(fields, "top", logprob)) for token_id, logprob in top)


def _check_float(fields: FrameFields, name: str, value: Any) -> float:
    if not isinstance(value, float):
        raise fields.error(name, "a number", value)
    return value


def _read_error(fields: FrameFields) -> DsmoeError:
    code, text = fields.texts("error", size=2)
    return _ERRORS.get(code, DsmoeError)(text)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


def _scores_to_payloads(scores: Sequence[SampledToken]) -> list[Buffer]:
    """Return four arrays: token ids ``(P,)``, log probabilities ``(P,)``, most likely ids and theirs ``(P, K)``."""
    tops = [score.top_logprobs for score in scores]
    return [
        np.array([score.token_id for score in scores], dtype="<i4").tobytes(),
        np.array([score.logprob for score in scores], dtype="<f8").tobytes(),
        np.array([token_id for top in tops for token_id, _ in top], dtype="<i4").tobytes(),
        np.array([logprob for top in tops for _, logprob in top], dtype="<f8").tobytes(),
    ]


def _read_scores(more: Frame) -> tuple[SampledToken, ...]:
    first = FrameFields(more, _NAME).integer("prompt")
    payloads = more.payloads[first : first + _NUM_PROMPT_PAYLOADS]
    sizes = [memoryview(payload).nbytes for payload in payloads]
    num_scores = sizes[0] // 4 if sizes else 0
    whole = len(sizes) == _NUM_PROMPT_PAYLOADS and sizes[1] == 2 * sizes[0] and sizes[3] == 2 * sizes[2]
    if not whole or sizes[0] % 4 or sizes[2] % 4 or (sizes[2] and (not num_scores or sizes[2] % sizes[0])):
        raise FrameError(f"{_NAME}: a prompt's log probabilities must be four arrays that fit; found sizes {sizes}.")
    ids, logprobs, top_ids, top_logprobs = (
        np.frombuffer(payload, dtype=dtype).tolist()
        for payload, dtype in zip(payloads, ("<i4", "<f8", "<i4", "<f8"), strict=True)
    )
    num_top = len(top_ids) // num_scores if num_scores else 0
    pairs = tuple(zip(top_ids, top_logprobs, strict=True))
    return tuple(SampledToken(ids[p], logprobs[p], pairs[p * num_top : (p + 1) * num_top]) for p in range(num_scores))
