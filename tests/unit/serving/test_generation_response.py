import asyncio
import json

import pytest

from dsmoe_ray.errors import DeadlineError
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.serving import generation_response
from dsmoe_ray.serving.config import HttpConfig
from dsmoe_ray.serving.gateway import Gateway
from dsmoe_ray.serving.generation_response import GenerationResponse
from dsmoe_ray.serving.http_edge import ABORT_EXTENSION, ClientGoneError
from dsmoe_ray.serving.openai_api.requests import PlannedCall, PlannedPrompt
from dsmoe_ray.serving.openai_api.served_model import load_served_model
from tests.fakes.scripted_pool import ScriptedPool, make_output
from tests.fakes.tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_served_model(write_tiny_artifact(tmp_path_factory.mktemp("response") / "model"))


class Client:
    """The other end of a connection, as ASGI shows it."""

    def __init__(self, *, reads=True):
        self.sent = []
        self.has_left = asyncio.Event()
        self.was_cut = False
        self._reads = reads

    async def receive(self):
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if not self._reads and self.sent:
            await asyncio.Event().wait()
        self.sent.append(message)

    def cut(self):
        self.was_cut = True

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.sent)


def run(model, script, *, stream=True, timeout_s=20.0, reads=True):
    request = GenerationRequest(prompt_ids=[1], max_tokens=4)
    call = PlannedCall(
        request_id="x", is_chat=False, prompts=[PlannedPrompt(request=request)], n=1, stream=stream, include_usage=False
    )

    async def main():
        pool, client = ScriptedPool(), Client(reads=reads)
        gateway = Gateway(pool, model, HttpConfig(), max_sequences=4)
        response = GenerationResponse(gateway, call, arrived_s=generation_response.monotonic_s(), timeout_s=timeout_s)
        scope = {"type": "http", "extensions": {ABORT_EXTENSION: client.cut}}
        answer = asyncio.create_task(response(scope, client.receive, client.send))
        await asyncio.wait_for(script(pool, client, answer), 20)
        assert pool.closed == [0] and gateway.admission.num_sequences == 0

    asyncio.run(main())


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def test_an_event_leaves_as_soon_as_its_token_is_there(model):
    async def script(pool, client, answer):
        await settle()
        assert not client.sent
        for text in "ab":
            pool.say(make_output(1, text))
            await settle()
            assert f'"text":"{text}"'.encode() in client.sent[-1]["body"]
        pool.say(make_output(1, "c", finish_reason="stop"), None)
        await answer
        assert client.body.endswith(b"data: [DONE]\n\n") and not client.sent[-1]["more_body"]

    run(model, script)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_the_call(model, stream):
    async def script(pool, client, answer):
        await settle()
        pool.say(make_output(1, "a"))
        await settle()
        client.has_left.set()
        with pytest.raises(ClientGoneError):
            await answer
        assert b"[DONE]" not in client.body

    run(model, script, stream=stream)


def test_a_routers_own_timeout_is_no_fault_of_the_client(model):
    async def script(pool, client, answer):
        await settle()
        pool.say(TimeoutError("inside"))
        with pytest.raises(TimeoutError, match="inside"):
            await answer
        assert not client.was_cut

    run(model, script)


def test_a_late_call_has_a_status_before_its_stream_and_an_event_within(model):
    async def before(pool, client, answer):
        with pytest.raises(DeadlineError):
            await answer
        assert not client.sent

    async def within(pool, client, answer):
        await settle()
        pool.say(make_output(1, "a"))
        await answer
        event = client.body.split(b"\n\n")[-2]
        assert event.startswith(b"event: error\ndata: ")
        assert json.loads(event.partition(b"data: ")[2])["error"]["code"] == "deadline_exceeded"

    run(model, before, timeout_s=0.05)
    run(model, within, timeout_s=0.05)


def test_a_client_that_does_not_read_is_cut_off(model, monkeypatch):
    monkeypatch.setattr(generation_response, "_STALLED_S", 0.05)

    async def script(pool, client, answer):
        await settle()
        pool.say(make_output(1, "a"))
        with pytest.raises(ClientGoneError):
            await answer
        assert client.was_cut

    run(model, script, timeout_s=0.05, reads=False)


def test_a_reader_hears_something_while_nothing_comes(model, monkeypatch):
    monkeypatch.setattr("dsmoe_ray.serving.gateway._FIRST_POKE_S", 0.01)
    monkeypatch.setattr("dsmoe_ray.serving.gateway._POKE_S", 0.01)

    async def script(pool, client, answer):
        while client.body.count(b": waiting\n\n") < 2:
            await asyncio.sleep(0.005)
        pool.say(make_output(1, "c", finish_reason="stop"), None)
        await answer
        assert client.sent[0]["status"] == 200 and b'"text":"c"' in client.body

    run(model, script)
