"""Messages between gateways and routers to frames and back.

What comes from the wire is checked here: a frame that is not what its kind says is a ``FrameError``, a request that is
well written and impossible a ``RequestError``; both name the field. Token ids travel as raw int32, what a step added to
sequences as one column for each field, so that a frame of 32 sequences costs little more than one of a single sequence.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import numpy as np

from dsmoe_ray.errors import ConfigError, FrameError, RequestError
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import GREEDY, SamplingConfig, show_number
from dsmoe_ray.model.config import RoutingConfig
from dsmoe_ray.model.layer_routing import LayerRouting
from dsmoe_ray.serving.wire.connection import Buffer, Frame
from dsmoe_ray.serving.wire.fields import (
    MAX_TEXT,
    check_num_payloads,
    read_array,
    read_choice,
    read_flag,
    read_int,
    read_ints,
    read_list,
    read_text,
    read_texts,
)
from dsmoe_ray.serving.wire.messages import (
    CancelMessage,
    GenerateMessage,
    Kind,
    OutputsMessage,
    RejectedMessage,
    RejectReason,
    RouterStatusMessage,
)
from dsmoe_ray.serving.wire.outputs_codec import outputs_from_frame, outputs_to_frame

GenerationMessage = GenerateMessage | CancelMessage | OutputsMessage | RejectedMessage | RouterStatusMessage

_MIN_TOKEN_ID, _MAX_TOKEN_ID = -(2**31), 2**31 - 1
_MOST = 2**53
"""No limit on tokens reaches it, so that larger ones mean the same."""
_INT32 = np.dtype("<i4")
_ID_FIELDS = ("prompt_ids", "generated_ids", "stop_token_ids")
"""One payload each."""
_SAMPLING_FIELDS = tuple(SamplingConfig.__dataclass_fields__)
_STATUS_COUNTS = ("num_running", "num_waiting", "num_free_tokens", "num_outstanding_tokens", "step_age_ms")


def to_frame(message: GenerationMessage) -> Frame:
    """Return a message as it travels.

    Raises:
        RequestError: a request holds a number that no wire carries.
    """
    return _WRITERS[type(message)](message)


def from_frame(frame: Frame) -> GenerationMessage:
    """Return the message that came.

    Raises:
        FrameError: it is no message between gateways and routers, or not what its kind says.
        RequestError: it is a request, and impossible. ``request_id_of`` tells whose.
    """
    read = _READERS.get(frame.kind)
    if read is None:
        raise FrameError(f"a frame of kind {frame.kind} came; gateways and routers know {sorted(map(int, _READERS))}.")
    return read(frame)


def request_id_of(frame: Frame) -> str:
    """Return whose request a GENERATE frame holds, possible or not.

    Raises:
        FrameError: it does not say so.
    """
    return read_text(frame, "id")


def _generate_to_frame(message: GenerateMessage) -> Frame:
    request = message.request
    header: dict[str, Any] = {
        "id": message.request_id,
        "max_tokens": min(int(request.max_tokens), _MOST),
        "n": int(request.n),
        "sampling": _sampling_to_header(request.sampling),
        "stop": list(request.stop),
        "include_stop_in_output": bool(request.include_stop_in_output),
        "ignore_eos": bool(request.ignore_eos),
        "prompt_logprobs": None if request.prompt_logprobs is None else int(request.prompt_logprobs),
        "routing": None
        if request.routing is None
        else [[rule.to_spec() for rule in layer] for layer in request.routing],
        "deadline_ms": message.deadline_ms,
    }
    payloads = [_ids_to_payload(name, getattr(request, name)) for name in _ID_FIELDS]
    return Frame(Kind.GENERATE, header, payloads)


def _sampling_to_header(sampling: SamplingConfig) -> dict[str, Any]:
    """Return the fields that are not the default ones, as plain numbers."""
    header: dict[str, Any] = {}
    for name in _SAMPLING_FIELDS:
        value = getattr(sampling, name)
        if value == getattr(GREEDY, name):
            continue
        if name == "logit_bias":
            header[name] = [[_check_id(name, token_id) for token_id in value], list(value.values())]
        elif name in ("top_k", "seed", "logprobs"):
            header[name] = min(int(value), _MOST) if name == "top_k" else int(value)
        else:
            header[name] = float(value)
    return header


def _check_id(param: str, token_id: int) -> int:
    # What fits and is no token of the model is the engine's to refuse.
    if not _MIN_TOKEN_ID <= token_id <= _MAX_TOKEN_ID:
        raise RequestError(
            f"{param} has the token id {show_number(token_id)}; token ids are 0 to {_MAX_TOKEN_ID}.", param=param
        )
    return int(token_id)


def _ids_to_payload(param: str, ids: Sequence[int]) -> Buffer:
    try:
        return np.array(ids, dtype=_INT32).tobytes()
    except OverflowError:
        for token_id in ids:
            _check_id(param, token_id)
        raise


def _generate_from_frame(frame: Frame) -> GenerateMessage:
    check_num_payloads(frame, len(_ID_FIELDS))
    values = frame.header
    request = GenerationRequest(
        **{name: tuple(read_array(frame, idx, name, _INT32).tolist()) for idx, name in enumerate(_ID_FIELDS)},
        # The request itself checks these, and the items of its lists.
        max_tokens=values.get("max_tokens"),  # type: ignore[arg-type]
        n=values.get("n"),  # type: ignore[arg-type]
        prompt_logprobs=values.get("prompt_logprobs"),
        sampling=_sampling_from_header(values.get("sampling")),
        stop=read_list(frame, "stop"),
        include_stop_in_output=read_flag(frame, "include_stop_in_output"),
        ignore_eos=read_flag(frame, "ignore_eos"),
        routing=_routing_from_header(values.get("routing")),
    )
    return GenerateMessage(
        request_id=read_text(frame, "id"),
        request=request,
        deadline_ms=None if values.get("deadline_ms") is None else read_int(frame, "deadline_ms"),
    )


def _sampling_from_header(header: Any) -> SamplingConfig:
    if not isinstance(header, Mapping) or not header.keys() <= set(_SAMPLING_FIELDS):
        raise FrameError(f"sampling must map fields of SamplingConfig to values; found {header!r:.60}")
    values = dict(header)
    bias = values.get("logit_bias")
    if bias is not None:
        columns = (
            isinstance(bias, list | tuple) and len(bias) == 2 and all(isinstance(one, list | tuple) for one in bias)
        )
        if not columns or len(bias[0]) != len(bias[1]) or not all(type(token_id) is int for token_id in bias[0]):
            raise FrameError("logit_bias must be a list of token ids and one of as many numbers")
        values["logit_bias"] = dict(zip(*bias, strict=True))
    return SamplingConfig(**values)


def _routing_from_header(routing: Any) -> tuple[LayerRouting, ...] | None:
    if routing is None:
        return None
    if not isinstance(routing, list | tuple):
        raise FrameError(f"routing must be an array of rules for each layer; found {routing!r:.60}")
    rules = []
    for layer in routing:
        pair = layer if isinstance(layer, list | tuple) else ()
        if len(pair) != 2 or not all(isinstance(spec, str) for spec in pair):
            raise FrameError(f"routing must have two rules for each layer; found {layer!r:.60}")
        rules.append(LayerRouting(*map(_parse_rule, pair)))
    return tuple(rules)


@functools.lru_cache(maxsize=256)
def _parse_rule(spec: str) -> RoutingConfig:
    try:
        return RoutingConfig.parse(spec)
    except ConfigError as error:
        raise RequestError(str(error), param="routing") from error


def _cancel_to_frame(message: CancelMessage) -> Frame:
    return Frame(Kind.CANCEL, {"ids": list(message.request_ids)})


def _cancel_from_frame(frame: Frame) -> CancelMessage:
    return CancelMessage(request_ids=tuple(read_texts(frame, "ids")))


def _rejected_to_frame(message: RejectedMessage) -> Frame:
    text = message.message[:MAX_TEXT]
    header = {"id": message.request_id, "reason": message.reason, "message": text, "param": message.param}
    return Frame(Kind.REJECTED, header)


def _rejected_from_frame(frame: Frame) -> RejectedMessage:
    return RejectedMessage(
        request_id=read_text(frame, "id"),
        reason=read_choice(frame, "reason", get_args(RejectReason)),
        message=read_text(frame, "message"),
        param=None if frame.header.get("param") is None else read_text(frame, "param"),
    )


def _status_to_frame(message: RouterStatusMessage) -> Frame:
    counts = [getattr(message, name) for name in _STATUS_COUNTS]
    return Frame(Kind.ROUTER_STATUS, {"counts": counts, "leaving": message.leaving})


def _status_from_frame(frame: Frame) -> RouterStatusMessage:
    counts = read_ints(frame, "counts", size=len(_STATUS_COUNTS))
    return RouterStatusMessage(**dict(zip(_STATUS_COUNTS, counts, strict=True)), leaving=read_flag(frame, "leaving"))


_WRITERS: dict[type, Callable[[Any], Frame]] = {
    GenerateMessage: _generate_to_frame,
    CancelMessage: _cancel_to_frame,
    OutputsMessage: outputs_to_frame,
    RejectedMessage: _rejected_to_frame,
    RouterStatusMessage: _status_to_frame,
}
_READERS: dict[int, Callable[[Frame], GenerationMessage]] = {
    Kind.GENERATE: _generate_from_frame,
    Kind.CANCEL: _cancel_from_frame,
    Kind.OUTPUTS: outputs_from_frame,
    Kind.REJECTED: _rejected_from_frame,
    Kind.ROUTER_STATUS: _status_from_frame,
}
