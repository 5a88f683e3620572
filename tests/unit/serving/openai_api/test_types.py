import json

import pytest

from dsmoe_ray.serving.openai_api.errors import ApiError
from dsmoe_ray.serving.openai_api.types import ChatBody, CompletionBody, parse_body


def parse(schema=CompletionBody, **fields):
    return parse_body(json.dumps(fields).encode(), schema)


def test_null_counts_as_absent():
    assert parse(prompt="a", n=None, stop=None, suffix=None, stream_options=None) == parse(prompt="a")


def test_bookkeeping_and_what_asks_for_nothing_is_taken():
    extras = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "store": False, "tools": []}
    body = parse(ChatBody, messages=[], response_format={"type": "text"}, tool_choice="none", **extras)
    assert body == parse(ChatBody, messages=[])


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": "a", "max_token": 1}, "max_token", "unknown_parameter"),
        (
            {"prompt": "a", "stream_options": {"include_usages": True}},
            "stream_options.include_usages",
            "unknown_parameter",
        ),
        ({"prompt": "a", "suffix": "b"}, "suffix", "unsupported_parameter"),
        ({"prompt": "a", "n": "1"}, "n", None),
        ({"prompt": "a", "n": True}, "n", None),
        ({"prompt": "a", "n": 1.5}, "n", None),
        ({"prompt": "a", "temperature": "hot"}, "temperature", None),
        ({"prompt": "a", "logit_bias": {"1": "x"}}, "logit_bias.1", None),
        ({"prompt": "a", "stop_token_ids": [1, None]}, "stop_token_ids[1]", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_field_is_named(fields, param, code):
    with pytest.raises(ApiError) as caught:
        parse(**fields)
    assert (caught.value.param, caught.value.code, caught.value.status) == (param, code, 400)


def test_the_nearest_field_is_suggested():
    with pytest.raises(ApiError, match="did you mean 'max_tokens'"):
        parse(prompt="a", max_tokns=3)


def test_a_required_field_is_missed():
    with pytest.raises(ApiError, match="required") as caught:
        parse(ChatBody)
    assert caught.value.param == "messages" and caught.value.code == "missing_required_parameter"
