"""The HTTP API over a real socket: routes, answers, streams and errors."""

import json

import httpx
import pytest

from tests.fakes.gateway_server import run_gateway
from tests.fakes.tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = write_tiny_artifact(tmp_path_factory.mktemp("gateway") / "model")
    with run_gateway(directory) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def complete(client, **fields):
    response = client.post("/v1/completions", json={"prompt": "def add", "temperature": 0, "max_tokens": 6} | fields)
    assert response.status_code == 200, response.text
    return response.json()


def stream(client, **fields):
    fields = {"prompt": "def add", "temperature": 0, "max_tokens": 6, "stream": True} | fields
    with client.stream("POST", "/v1/completions", json=fields) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_stream_has_the_text_of_the_whole_answer(client):
    whole = complete(client)["choices"][0]
    events = stream(client)
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "length"


def test_every_state_route_answers(client):
    for path in ("/health", "/ready", "/version", "/v1/models", "/v1/models/tiny", "/tokenizer_info", "/metrics"):
        assert client.get(path).status_code == 200, path
