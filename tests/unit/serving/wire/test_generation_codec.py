"""Messages between gateways and routers through frames and back, and what is refused of what comes."""

import dataclasses
import math

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.errors import DsmoeError, ExpertUnavailableError, FrameError, RequestError
from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import SampledToken, SamplingConfig
from dsmoe_ray.model.config import RoutingConfig
from dsmoe_ray.model.layer_routing import LayerRouting
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.generation_codec import from_frame, request_id_of, to_frame
from dsmoe_ray.serving.wire.messages import (
    CancelMessage,
    GenerateMessage,
    Kind,
    OutputsMessage,
    RejectedMessage,
    RouterStatusMessage,
)

ROUTING = [
    LayerRouting(RoutingConfig.parse("top_k=2"), RoutingConfig.parse("threshold=0.1")),
    LayerRouting(ffn=RoutingConfig.parse("top_p=0.30000000000000004")),
]
REQUEST = GenerationRequest(
    prompt_ids=[1, 2, 2**31 - 1],
    max_tokens=7,
    sampling=SamplingConfig(
        temperature=0.1 + 0.2,
        top_k=5,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.1,
        presence_penalty=-0.5,
        frequency_penalty=2,
        logit_bias={3: -100.0, 7: 0.5},
        seed=2**64 - 1,
        logprobs=3,
    ),
    stop=["\n\n", "\u6f22"],
    include_stop_in_output=True,
    stop_token_ids=[0, 9],
    ignore_eos=True,
    routing=ROUTING,
    generated_ids=[4, 5],
)
TOKEN = SampledToken(7, -1.25, ((7, -1.25), (3, -math.inf)))
OUTPUTS = [
    SequenceOutput(request_id="a", sequence_idx=0, token=SampledToken(5), text=""),
    SequenceOutput(request_id="b", sequence_idx=2, token=TOKEN, text="\u6f22 "),
    SequenceOutput(
        request_id="c",
        sequence_idx=0,
        token=None,
        text="",
        prompt_logprobs=(TOKEN, TOKEN._replace(token_id=8)),
        finish_reason="length",
    ),
    SequenceOutput(request_id="d", sequence_idx=1, token=None, text="x", finish_reason="stop", stop_reason=0),
    SequenceOutput(request_id="e", sequence_idx=0, token=TOKEN, text="", finish_reason="stop", stop_reason="\n\n"),
    SequenceOutput(
        request_id="f", sequence_idx=0, token=SampledToken(1), text="", prompt_logprobs=(), finish_reason="length"
    ),
    SequenceOutput(
        request_id="g", sequence_idx=0, token=SampledToken(1), text="", prompt_logprobs=(SampledToken(3, -0.5),)
    ),
]
MESSAGES = [
    GenerateMessage(request_id="a", request=REQUEST, deadline_ms=1500),
    GenerateMessage(request_id="a", request=GenerationRequest(prompt_ids=[1], max_tokens=0, prompt_logprobs=2)),
    CancelMessage(request_ids=("a", "b")),
    OutputsMessage(outputs=tuple(OUTPUTS)),
    OutputsMessage(outputs=()),
    RejectedMessage(request_id="a", reason="invalid", message="no", param="n"),
    RejectedMessage(request_id="a", reason="full", message="no"),
    RouterStatusMessage(
        num_running=1, num_waiting=2, num_free_tokens=3, num_outstanding_tokens=4, step_age_ms=5, leaving=True
    ),
]


def over_the_wire(frame):
    """Return a frame as a peer reads it: its header went through msgpack, its payloads are views."""
    header = msgpack.unpackb(msgpack.packb(frame.header))
    return Frame(int(frame.kind), header, [memoryview(payload) for payload in frame.payloads])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message):
    assert from_frame(over_the_wire(to_frame(message))) == message


@pytest.mark.parametrize(("kind", "text"), [(DsmoeError, "broken"), (ExpertUnavailableError, "expert 7")])
def test_why_a_sequence_failed_keeps_its_kind(kind, text):
    failed = dataclasses.replace(OUTPUTS[0], token=None, finish_reason="error", error=kind(text))
    (read,) = from_frame(over_the_wire(to_frame(OutputsMessage(outputs=(failed,))))).outputs
    assert (type(read.error), str(read.error), read.finish_reason) == (kind, text, "error")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_ids": [1, 2**31]}, "prompt_ids"),
        ({"generated_ids": [-(2**70)]}, "generated_ids"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids"),
        ({"sampling": SamplingConfig(logit_bias={2**70: 1.0})}, "logit_bias"),
    ],
    ids=["prompt", "generated", "stop tokens", "bias"],
)
def test_a_number_that_no_wire_carries_is_the_requests_error(fields, param):
    request = GenerationRequest(**{"prompt_ids": [1], "max_tokens": 9} | fields)
    with pytest.raises(RequestError, match="token ids are 0 to 2147483647") as caught:
        to_frame(GenerateMessage(request_id="a", request=request))
    assert caught.value.param == param


def test_limits_beyond_any_use_are_cut_to_what_a_wire_carries():
    request = GenerationRequest(prompt_ids=[1], max_tokens=10**30, sampling=SamplingConfig(top_k=10**30, temperature=1))
    read = from_frame(over_the_wire(to_frame(GenerateMessage(request_id="a", request=request)))).request
    assert read.max_tokens == read.sampling.top_k == 2**53


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", "9", "max_tokens"),
        ("n", 1000, "n"),
        ("stop", [""], "stop"),
        ("sampling", {"temperature": "hot"}, "temperature"),
        ("sampling", {"logit_bias": [[1], [1000.0]]}, "logit_bias"),
        ("routing", [["top_k=2", "magic"]], "routing"),
        ("prompt_logprobs", -1, "prompt_logprobs"),
    ],
)
def test_an_impossible_request_names_its_field_and_whose_it_is(field, value, param):
    frame = over_the_wire(to_frame(MESSAGES[0]))
    frame = dataclasses.replace(frame, header={**frame.header, field: value})
    with pytest.raises(RequestError) as caught:
        from_frame(frame)
    assert caught.value.param == param
    assert request_id_of(frame) == "a"


WRONG_FIELDS = [
    (Kind.GENERATE, "id", 7),
    (Kind.GENERATE, "stop", "x"),
    (Kind.GENERATE, "sampling", []),
    (Kind.GENERATE, "sampling", {"heat": 1}),
    (Kind.GENERATE, "sampling", {"logit_bias": [[1], []]}),
    (Kind.GENERATE, "ignore_eos", 1),
    (Kind.GENERATE, "routing", [["dense"]]),
    (Kind.CANCEL, "ids", ["a", 1]),
    (Kind.OUTPUTS, "ids", "abcdefg"),
    (Kind.OUTPUTS, "tokens", [1, 2]),
    (Kind.OUTPUTS, "tokens", [True] * len(OUTPUTS)),
    (Kind.OUTPUTS, "texts", [b""] * len(OUTPUTS)),
    (Kind.OUTPUTS, "more", [[99, {}]]),
    (Kind.OUTPUTS, "more", [[0, {"logprob": "x"}]]),
    (Kind.OUTPUTS, "more", [[0, {"logprob": -1.0, "top": [1]}]]),
    (Kind.OUTPUTS, "more", [[0, {"finish": "done"}]]),
    (Kind.OUTPUTS, "more", [[0, {"finish": "stop", "stop": []}]]),
    (Kind.OUTPUTS, "more", [[0, {"prompt": 9}]]),
    (Kind.OUTPUTS, "more", [[0, {"prompt": [4, 0]}]]),
    (Kind.OUTPUTS, "more", [[0, {"prompt": [2, 9]}]]),
    (Kind.OUTPUTS, "more", [[0, {"error": ["error"]}]]),
    (Kind.REJECTED, "reason", "bored"),
    (Kind.ROUTER_STATUS, "counts", [1, 2]),
    (Kind.ROUTER_STATUS, "leaving", None),
]


@pytest.mark.parametrize(("kind", "field", "value"), WRONG_FIELDS)
def test_a_frame_with_a_wrong_field_is_refused_by_name(kind, field, value):
    (frame,) = [
        frame
        for frame in map(to_frame, MESSAGES[:1] + MESSAGES[2:4] + MESSAGES[5:6] + MESSAGES[7:])
        if frame.kind == kind
    ]
    frame = over_the_wire(frame)
    inner = next(iter(value[0][1]), "more") if field == "more" and value[0][1] else field
    with pytest.raises(FrameError, match=f"{inner}|logit_bias|top|stop"):
        from_frame(dataclasses.replace(frame, header={**frame.header, field: value}))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_frame_with_nothing_in_it_is_refused(message):
    with pytest.raises(FrameError, match=r"must be|payloads"):
        from_frame(Frame(to_frame(message).kind, {}))


def test_a_frame_of_another_kind_or_with_cut_arrays_is_refused():
    with pytest.raises(FrameError, match="kind 3"):
        from_frame(Frame(Kind.EXPERT_REFUSAL, {}))
    generate = to_frame(MESSAGES[0])
    for payloads in ((), (b"abc", b"", b""), (*generate.payloads, b"")):
        with pytest.raises(FrameError, match=r"payloads|bytes"):
            from_frame(dataclasses.replace(generate, payloads=payloads))
    outputs = to_frame(MESSAGES[3])
    for payloads in ((), outputs.payloads[:3], (*outputs.payloads[:3], b"abc")):
        with pytest.raises(FrameError, match=r"payloads|bytes|prompt"):
            from_frame(dataclasses.replace(outputs, payloads=payloads))


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_whatever_comes_is_a_message_or_refused(data):
    frame = over_the_wire(to_frame(data.draw(st.sampled_from(MESSAGES))))
    header = dict(frame.header)
    for field in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=3)):
        header[field] = data.draw(PLAIN)
    payloads = data.draw(st.just(frame.payloads) | st.lists(st.binary(max_size=16), max_size=5))
    try:
        message = from_frame(Frame(frame.kind, header, payloads))
    except (FrameError, RequestError):
        return
    assert type(message) in {type(one) for one in MESSAGES}
