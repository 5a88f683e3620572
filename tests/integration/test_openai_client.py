"""The official client of OpenAI's API against a running server: it needs to know nothing of ours."""

import asyncio
import threading
import time

import pytest

openai = pytest.importorskip("openai")

from tests.fakes.gateway_server import CHAT_TEMPLATE, run_gateway  # noqa: E402
from tests.fakes.tiny_artifact import write_tiny_artifact  # noqa: E402

pytestmark = pytest.mark.slow

PROMPT = "def add(left"
MESSAGES = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("openai") / "model"
    write_tiny_artifact(directory, chat_template=CHAT_TEMPLATE, max_seq_len=256)
    with run_gateway(directory) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def complete(client, **fields):
    return client.completions.create(**({"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "seed": 3} | fields))


def chat(client, **fields):
    return client.chat.completions.create(
        **({"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 3} | fields)
    )


def test_the_model_is_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "dsmoe_ray"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


def test_a_completion_counts_its_tokens(client):
    found = complete(client)
    assert found.object == "text_completion" and found.model == "tiny" and found.id.startswith("cmpl-")
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.completion_tokens, found.usage.total_tokens) == (8, 8 + found.usage.prompt_tokens)


def test_a_streamed_completion_is_the_whole_one(client):
    whole = complete(client)
    chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_streamed_chat_is_the_whole_one(client):
    whole = chat(client)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].object == "chat.completion.chunk" and chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_a_seed_gives_the_same_texts_again_and_n_gives_others(client):
    first, again = complete(client, n=3), complete(client, n=3)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices] and len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts[0] == complete(client).choices[0].text
    streamed = ["", "", ""]
    for chunk in complete(client, n=3, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_a_list_of_prompts_gives_a_text_for_each(client):
    found = complete(client, prompt=[PROMPT, "# na", PROMPT])
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in (PROMPT, "# na")]
    assert [choice.text for choice in found.choices] == [*alone, alone[0]]


def test_a_stop_string_ends_the_text_before_it(client):
    text = complete(client, max_tokens=24).choices[0].text
    stop = text[3:5]
    cut = complete(client, max_tokens=24, stop=[stop, "never there"])
    assert cut.choices[0].text == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"
    streamed = complete(client, max_tokens=24, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == cut.choices[0].text


def test_a_bias_forces_a_token(client, server):
    token_id = server.model.encode("def")[0]
    found = complete(client, logit_bias={str(token_id): 100}, temperature=0, max_tokens=3)
    assert found.choices[0].text == "defdefdef"


def test_penalties_and_extras_reach_the_engine(client, server):
    settings = {"temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    extras = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "stop_token_ids": [7], "ignore_eos": True}
    complete(client, **settings, logit_bias={"5": -3}, stop="q", extra_body=extras | {"routing": {"k": 1}})
    asked = list(server.pool.requests.values())[-1]
    sampling = asked.sampling
    assert {name: getattr(sampling, name) for name in settings} == settings
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (5, 0.01, 1.1)
    assert (asked.stop_token_ids, asked.ignore_eos, asked.stop) == ((7,), True, ("q",))
    assert dict(sampling.logit_bias) == {5: -3.0} and sampling.seed == 3
    assert {layer.ffn.to_spec() for layer in asked.routing} == {"top_k=1"}


def test_completion_logprobs_tell_every_token(client):
    found = complete(client, logprobs=3, temperature=0, max_tokens=5)
    choice = found.choices[0]
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 5
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values()) and len(top) == 3
    streamed = [
        chunk.choices[0].logprobs for chunk in complete(client, logprobs=3, temperature=0, max_tokens=5, stream=True)
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [one for part in streamed for one in getattr(part, name)] == getattr(told, name)


def test_chat_logprobs_tell_every_token(client):
    found = chat(client, logprobs=True, top_logprobs=2, temperature=0)
    told = found.choices[0].logprobs.content
    assert len(told) == found.usage.completion_tokens
    for token in told:
        assert len(token.top_logprobs) == 2 and token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == token.logprob
    text = b"".join(bytes(token.bytes) for token in told).decode(errors="replace")
    assert text == found.choices[0].message.content
    streamed = chat(client, logprobs=True, top_logprobs=2, temperature=0, stream=True)
    assert [token for chunk in streamed for token in chunk.choices[0].logprobs.content] == told


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"n": 1000}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, 300]}, "prompt"),
        ({"prompt": "x" * 300}, "prompt"),
        ({"best_of": 4}, "best_of"),
        ({"suffix": "tail"}, "suffix"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"stop": [""]}, "stop"),
        ({"extra_body": {"routing": {"k": 99}}}, "routing"),
        ({"extra_body": {"top_kk": 3}}, "top_kk"),
        ({"extra_body": {"ignore_eos": "yes"}}, "ignore_eos"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_field_is_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **fields)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_field_of_a_chat_is_named(client, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **fields)
    assert caught.value.param == param


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, model="gpt")
    assert caught.value.param == "model"


def test_leaving_a_stream_frees_its_place_within_a_second(client, server):
    stream = complete(client, max_tokens=240, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert server.pool.num_under_way == 1
    stream.close()
    started_s = time.monotonic()
    while server.pool.num_under_way or server.gateway.admission.num_sequences:
        assert time.monotonic() - started_s < 1
        time.sleep(0.01)


def test_an_async_client_reads_many_streams_at_once(server):
    async def read(client, seed):
        stream = await client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, seed=seed, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def read_all():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(read(client, seed) for seed in range(16)))

    texts = asyncio.run(read_all())
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert texts == [complete(client, max_tokens=16, seed=seed).choices[0].text for seed in range(16)]


def test_a_server_that_is_full_is_retried_by_the_client(server, client):
    # 32 places; a call whose texts fill them all is held, until another one has been refused once.
    server.pool.hold.clear()
    holder = threading.Thread(target=complete, args=(client,), kwargs={"n": 32, "max_tokens": 2})
    holder.start()
    while server.gateway.admission.num_sequences < 32:
        time.sleep(0.01)
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            complete(client)
        assert int(caught.value.response.headers["retry-after"]) >= 1
    finally:
        server.pool.hold.set()
        holder.join()
    assert complete(client).choices[0].text
