"""What a step added to many sequences, as one frame and back: the one frame that travels after every step.

Columns of ids, token ids and texts, and beside them the rest of those few outputs that have more to tell: the end of a
sequence, log probabilities. A prompt's log probabilities are raw payloads, as they can be long.
"""

from collections.abc import Hashable, Sequence
from typing import Any, get_args

import numpy as np

from dsmoe_ray.errors import DsmoeError, ExpertUnavailableError, FrameError
from dsmoe_ray.inference.outputs import FinishReason, SequenceOutput
from dsmoe_ray.inference.sampling_config import SampledToken
from dsmoe_ray.serving.wire.connection import Buffer, Frame
from dsmoe_ray.serving.wire.fields import (
    MAX_TEXT,
    check_num_payloads,
    read_array,
    read_choice,
    read_ints,
    read_list,
    read_texts,
)
from dsmoe_ray.serving.wire.messages import Kind, OutputsMessage

_NO_TOKEN = -1
_MAX_PIECE = 1 << 18
"""Characters that one step may add to a text."""
_ERRORS: dict[str, type[DsmoeError]] = {"error": DsmoeError, "expert_unavailable": ExpertUnavailableError}
_SCORE_DTYPES: tuple[np.dtype[Any], ...] = tuple(map(np.dtype, ("<i4", "<f8", "<i4", "<f8")))
"""Of the payloads that hold prompts' log probabilities: token ids and theirs, most likely ids and theirs."""


def outputs_to_frame(message: OutputsMessage) -> Frame:
    """Return the outputs of a step as they travel."""
    return pack_outputs([output.request_id for output in message.outputs], message.outputs)


def pack_outputs(ids: Sequence[Hashable], outputs: Sequence[SequenceOutput]) -> Frame:
    """Return outputs as they travel, with other request ids than those that they hold."""
    scores: list[SampledToken] = []
    header = {
        "ids": ids,
        "sequences": [output.sequence_idx for output in outputs],
        "tokens": [_NO_TOKEN if output.token is None else output.token.token_id for output in outputs],
        "texts": [output.text for output in outputs],
        "more": [
            [idx, _more_of(output, scores)]
            for idx, output in enumerate(outputs)
            if output.finish_reason is not None
            or output.prompt_logprobs is not None
            or (output.token is not None and output.token.logprob is not None)
        ],
    }
    return Frame(Kind.OUTPUTS, header, _scores_to_payloads(scores) if scores else ())


def outputs_from_frame(frame: Frame) -> OutputsMessage:
    """Return the outputs of a step that came.

    Raises:
        FrameError: it is not what it should be; names the field.
    """
    ids = read_texts(frame, "ids")
    size = len(ids)
    columns = (
        ids,
        read_ints(frame, "sequences", size=size),
        read_ints(frame, "tokens", low=_NO_TOKEN, size=size),
        read_texts(frame, "texts", size=size, max_chars=_MAX_PIECE),
    )
    scores = _Scores(frame)
    more: dict[int, Frame] = {}
    for pair in read_list(frame, "more"):
        if not _is_pair(pair) or type(pair[0]) is not int or not 0 <= pair[0] < size or not isinstance(pair[1], dict):
            raise FrameError(f"more must hold pairs of a place and fields; found {pair!r:.60}")
        more[pair[0]] = Frame(frame.kind, pair[1])
    return OutputsMessage(
        outputs=tuple(
            SequenceOutput(
                request_id=request_id,
                sequence_idx=sequence_idx,
                token=None if token_id == _NO_TOKEN else SampledToken(token_id),
                text=text,
            )
            if idx not in more
            else _read_full(more[idx], scores, request_id, sequence_idx, token_id, text)
            for idx, (request_id, sequence_idx, token_id, text) in enumerate(zip(*columns, strict=True))
        )
    )


def _more_of(output: SequenceOutput, scores: list[SampledToken]) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if output.token is not None and output.token.logprob is not None:
        more["logprob"] = output.token.logprob
        more["top"] = [list(pair) for pair in output.token.top_logprobs]
    if output.finish_reason is not None:
        more["finish"], more["stop"] = output.finish_reason, output.stop_reason
    if output.error is not None:
        code = "expert_unavailable" if isinstance(output.error, ExpertUnavailableError) else "error"
        more["error"] = [code, str(output.error)[:MAX_TEXT]]
    if output.prompt_logprobs is not None:
        # All of a prompt have as many alternatives.
        num_top = len(output.prompt_logprobs[0].top_logprobs) if output.prompt_logprobs else 0
        more["prompt"] = [len(output.prompt_logprobs), num_top]
        scores += output.prompt_logprobs
    return more


def _read_full(
    more: Frame, scores: "_Scores", request_id: str, sequence_idx: int, token_id: int, text: str
) -> SequenceOutput:
    """Return an output that has more to tell than its token and text."""
    values = more.header
    token = None
    if token_id != _NO_TOKEN:
        token = SampledToken(token_id)
        if "logprob" in values:
            token = SampledToken(token_id, _check_float("logprob", values["logprob"]), _read_top(more))
    stop_reason = values.get("stop")
    if stop_reason is not None and not (isinstance(stop_reason, str) or type(stop_reason) is int):
        raise FrameError(f"stop must be a string or a token id; found {stop_reason!r:.60}")
    return SequenceOutput(
        request_id=request_id,
        sequence_idx=sequence_idx,
        token=token,
        text=text,
        prompt_logprobs=scores.read(*read_ints(more, "prompt", size=2)) if "prompt" in values else None,
        finish_reason=read_choice(more, "finish", get_args(FinishReason)) if "finish" in values else None,
        stop_reason=stop_reason,
        error=_read_error(more) if "error" in values else None,
    )


def _read_top(more: Frame) -> tuple[tuple[int, float], ...]:
    top = read_list(more, "top")
    if not all(_is_pair(pair) and type(pair[0]) is int for pair in top):
        raise FrameError(f"top must hold pairs of a token id and its log probability; found {top!r:.60}")
    return tuple((token_id, _check_float("top", logprob)) for token_id, logprob in top)


def _check_float(name: str, value: Any) -> float:
    if not isinstance(value, float):
        raise FrameError(f"{name} must be a number; found {value!r:.60}")
    return value


def _read_error(more: Frame) -> DsmoeError:
    code, text = read_texts(more, "error", size=2)
    return _ERRORS.get(code, DsmoeError)(text)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _scores_to_payloads(scores: Sequence[SampledToken]) -> Sequence[Buffer]:
    """Return four arrays: token ids, log probabilities, and ids and log probabilities of the most likely tokens."""
    pairs = [pair for score in scores for pair in score.top_logprobs]
    columns: list[list[Any]] = [
        [score.token_id for score in scores],
        [score.logprob for score in scores],
        [token_id for token_id, _ in pairs],
        [logprob for _, logprob in pairs],
    ]
    return [np.array(column, dtype).tobytes() for column, dtype in zip(columns, _SCORE_DTYPES, strict=True)]


class _Scores:
    """The log probabilities of all prompts of a frame, read one prompt after the other."""

    def __init__(self, frame: Frame) -> None:
        self._columns: list[list[Any]] = [[], [], [], []]
        if frame.payloads:
            check_num_payloads(frame, len(_SCORE_DTYPES))
            self._columns = [
                read_array(frame, idx, "a prompt's log probabilities", dtype).tolist()
                for idx, dtype in enumerate(_SCORE_DTYPES)
            ]
        self._num_read = self._num_top_read = 0

    def read(self, num_scores: int, num_top: int) -> tuple[SampledToken, ...]:
        """Return the next prompt's."""
        start, top = self._num_read, self._num_top_read
        self._num_read, self._num_top_read = start + num_scores, top + num_scores * num_top
        ids, logprobs, top_ids, top_logprobs = self._columns
        if self._num_read > min(len(ids), len(logprobs)) or self._num_top_read > min(len(top_ids), len(top_logprobs)):
            raise FrameError("prompt must count the log probabilities that came; found more")
        pairs = tuple(zip(top_ids[top : self._num_top_read], top_logprobs[top : self._num_top_read], strict=True))
        return tuple(
            SampledToken(ids[start + p], logprobs[start + p], pairs[p * num_top : (p + 1) * num_top])
            for p in range(num_scores)
        )
