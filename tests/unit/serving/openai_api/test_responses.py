import json

import pytest

from dsmoe_ray.errors import DsmoeError
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import SampledToken
from dsmoe_ray.serving.openai_api.requests import PlannedCall, PlannedPrompt
from dsmoe_ray.serving.openai_api.responses import DONE, AnswerWriter
from tests.fakes.scripted_pool import make_output


def make_call(*, num_prompts=1, n=1, stream=True, is_chat=False, include_usage=False, **fields):
    request = GenerationRequest(prompt_ids=[5, 6], max_tokens=4, n=n)
    prompts = [PlannedPrompt(request=request, text="pq") for _ in range(num_prompts)]
    fields |= {"is_chat": is_chat, "stream": stream, "include_usage": include_usage}
    return PlannedCall(request_id="x", prompts=prompts, n=n, **fields)


def make_writer(model, **fields):
    return AnswerWriter(make_call(**fields), model, created_s=7)


def read(events):
    assert events.endswith(b"\n\n") or not events
    return [json.loads(line.removeprefix(b"data: ")) for line in events.split(b"\n\n") if line and line != DONE.strip()]


def test_outputs_that_came_together_are_one_event_for_each_text(model):
    writer = make_writer(model, n=2)
    outputs = [make_output(1, "a"), make_output(2, "x", idx=1), make_output(3, "b")]
    first = read(writer.write_events([(0, output) for output in outputs]))
    assert [(one["choices"][0]["index"], one["choices"][0]["text"]) for one in first] == [(0, "ab"), (1, "x")]
    last = read(writer.write_events([(0, make_output(4, "c", finish_reason="length"))]))
    assert [one["choices"][0] for one in last] == [
        {"index": 0, "text": "c", "logprobs": None, "finish_reason": "length"}
    ]
    assert last[0]["id"] == "cmpl-x" and last[0]["created"] == 7 and "usage" not in last[0]


def test_text_that_is_held_back_makes_no_event(model):
    writer = make_writer(model)
    assert len(read(writer.write_events([(0, make_output(1, ""))]))) == 1
    assert writer.write_events([(0, make_output(2, ""))]) == b""
    assert read(writer.write_events([(0, make_output(3, "abc"))]))[0]["choices"][0]["text"] == "abc"


def test_an_event_is_one_line_whatever_the_text_is(model):
    text = 'a"\\\n\r\u2028\x00\u6f22'
    event = make_writer(model).write_events([(0, make_output(1, text))])
    assert event.count(b"\n") == 2 and event.isascii() and b"\r" not in event
    assert read(event)[0]["choices"][0]["text"] == text


def test_texts_of_several_prompts_are_numbered_through(model):
    call = make_call(num_prompts=2, n=3, stream=False)
    writer = AnswerWriter(call, model, created_s=7)
    writer.take([(p, make_output(1, f"{p}{i}", idx=i, finish_reason="stop")) for p in (1, 0) for i in (2, 0, 1)])
    whole = json.loads(writer.write_whole())
    assert [choice["text"] for choice in whole["choices"]] == ["00", "01", "02", "10", "11", "12"]
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    # A prompt counts once, however many texts continue it.
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}


def test_usage_comes_last_and_null_before(model):
    writer = make_writer(model, include_usage=True)
    assert read(writer.write_events([(0, make_output(1, "a", finish_reason="stop"))]))[0]["usage"] is None
    end = writer.write_end()
    assert end.endswith(DONE)
    [last] = read(end)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 1
    assert make_writer(model).write_end() == DONE


def test_an_echo_starts_with_the_prompt_and_its_scores(model):
    writer = make_writer(model, echo=True, logprobs=1)
    scores = (SampledToken(6, -1.5, ((8, -0.5),)),)
    output = make_output(7, "r", logprob=-0.25, top=((7, -0.25),), prompt_logprobs=scores)
    [event] = read(writer.write_events([(0, output)]))
    choice = event["choices"][0]
    assert choice["text"] == "pqr"
    names = [model.name_token(token_id) for token_id in (5, 6, 7, 8)]
    assert choice["logprobs"] == {
        "tokens": names[:3],
        "token_logprobs": [None, -1.5, -0.25],
        "top_logprobs": [None, {names[3]: -0.5, names[1]: -1.5}, {names[2]: -0.25}],
        "text_offset": [0, 1, 2],
    }


def test_a_chat_says_its_role_once(model):
    writer = make_writer(model, is_chat=True)
    events = [event for text in "ab" for event in read(writer.write_events([(0, make_output(1, text))]))]
    assert [event["choices"][0]["delta"] for event in events] == [
        {"role": "assistant", "content": "a"},
        {"content": "b"},
    ]
    assert events[0]["object"] == "chat.completion.chunk" and events[0]["id"] == "chatcmpl-x"


def test_a_number_that_json_does_not_have_is_bounded(model):
    writer = make_writer(model, logprobs=0)
    [event] = read(writer.write_events([(0, make_output(1, "a", logprob=float("-inf")))]))
    assert event["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_a_failed_sequence_is_an_error(model):
    error = DsmoeError("not finite")
    with pytest.raises(DsmoeError, match="not finite"):
        make_writer(model).write_events([(0, make_output(finish_reason="error", error=error))])
