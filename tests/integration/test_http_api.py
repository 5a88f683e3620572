"""The HTTP API over a real socket: what is refused and how, limits, deadlines, clients that leave, and the end."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsmoe_ray.errors import DsmoeError, EngineFullError, ExpertUnavailableError
from dsmoe_ray.serving.openai_api.errors import ApiError
from tests.fakes.gateway_server import run_gateway
from tests.fakes.tiny_artifact import write_tiny_artifact

pytestmark = pytest.mark.slow

FIELDS = {"prompt": "def add", "temperature": 0, "max_tokens": 6}
LONG = {"prompt": "def add", "max_tokens": 240, "ignore_eos": True}
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_artifact(tmp_path_factory.mktemp("gateway") / "model", max_seq_len=256)


@pytest.fixture(scope="module")
def server(directory):
    with run_gateway(
        directory, max_body_bytes=100_000, max_prompts=4, max_header_bytes=8000, body_timeout_s=2
    ) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


@pytest.fixture
def held(server):
    """Keep the engine from working during a test."""
    server.pool.hold.clear()
    yield server.pool.hold
    server.pool.hold.set()


@pytest.fixture
def failing(server):
    def fail(error):
        server.pool.failure = error

    yield fail
    server.pool.failure = None


def complete(client, headers=None, **fields):
    return client.post("/v1/completions", json=FIELDS | fields, headers=headers)


def read_stream(client, fields, headers=None):
    with client.stream("POST", "/v1/completions", json=fields | {"stream": True}, headers=headers) as response:
        assert response.status_code == 200, response.read()
        return [line for line in response.iter_lines() if line and not line.startswith(":")]


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


def connect(server):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def read_all(connection):
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def wait_until(condition, limit_s=10.0):
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < limit_s
        time.sleep(0.005)
    return time.monotonic() - started_s


def is_idle(server):
    return not server.pool.num_under_way and not server.gateway.admission.num_sequences


def test_every_state_route_answers(client):
    for path in ("/health", "/ready", "/version", "/v1/models", "/v1/models/tiny", "/tokenizer_info", "/metrics"):
        assert client.get(path).status_code == 200, path
    assert client.head("/health").status_code == 200


def test_answers_of_one_connection_do_not_wait_for_the_network(client):
    durations_s = []
    for _ in range(20):
        started_s = time.monotonic()
        client.get("/health")
        durations_s.append(time.monotonic() - started_s)
    # A packet that waits for the acknowledgement of the one before it would take 40 ms every time.
    assert min(durations_s[1:]) < 0.03


def test_a_request_has_an_id_which_is_sent_back(client):
    assert client.get("/health", headers={"x-request-id": "a/b-1"}).headers["x-request-id"] == "a/b-1"
    made = {client.get("/health").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2 and all(len(one) == 32 for one in made)
    answer = complete(client, headers={"x-request-id": "my id"})
    assert answer.status_code == 400 and error_of(answer)["param"] == "x-request-id"
    assert complete(client, headers={"x-request-id": "mine"}).json()["id"] == "cmpl-mine"


def test_the_same_id_gives_the_same_tokens_and_another_one_others(client):
    texts = [
        [
            choice["text"]
            for choice in complete(client, {"x-request-id": name}, prompt=["a", "a"], temperature=1).json()["choices"]
        ]
        for name in ("first", "second", "first")
    ]
    assert texts[0] == texts[2] != texts[1]
    # Equal prompts of one call are no reason for equal texts.
    assert texts[0][0] != texts[0][1]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/tiny", 405, "method_not_allowed"),
        ("GET", "/v1/models/a%2fb", 404, "model_not_found"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
def test_what_is_not_there_is_an_error_like_all_others(client, method, path, status, code):
    answer = client.request(method, path)
    assert answer.status_code == status and error_of(answer)["code"] == code
    assert answer.headers["x-request-id"]
    assert status != 405 or answer.headers["allow"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b"[" * 50_000, "application/json", 400),
        (b'{"prompt": "a", "max_tokens": 1' + b"0" * 5000 + b"}", "application/json", 400),
        (b'{"prompt": "a", "seed": 1' + b"0" * 50 + b"}", "application/json", 400),
    ],
    ids=["cut off", "nothing", "a list", "half a character", "no number", "no JSON", "deep", "huge", "no seed"],
)
def test_a_body_that_cannot_be_is_refused(client, content, kind, status):
    answer = client.post("/v1/completions", content=content, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    error_of(answer)


def test_a_body_beyond_the_limit_is_refused_before_it_is_read(client, server):
    answer = client.post("/v1/completions", json={"prompt": "x" * 200_000})
    assert answer.status_code == 413 and error_of(answer)["code"] == "body_too_large"
    with connect(server) as connection:
        connection.sendall(HEAD + b"content-length: 99999999999999999999\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 4")
    with connect(server) as connection:
        connection.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        # More than the limit, of an unknown length; the answer comes without its end.
        piece = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
        connection.sendall(piece * 8)
        assert read_all(connection).startswith(b"HTTP/1.1 413")


def test_a_connection_can_be_used_again_after_a_refusal(server):
    with connect(server) as connection:
        # The body comes after its refusal.
        connection.sendall(HEAD.replace(b"json", b"xml") + b"content-length: 4\r\n\r\n")
        answer = connection.recv(65536)
        connection.sendall(b"1234GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer += read_all(connection)
    assert answer.startswith(b"HTTP/1.1 415") and b"HTTP/1.1 200" in answer


def test_a_body_that_does_not_arrive_is_not_waited_for(server):
    with connect(server) as connection:
        connection.sendall(HEAD + b'content-length: 50\r\n\r\n{"prompt"')
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408") and b'"timeout"' in answer


def test_a_head_is_bounded_in_bytes_and_in_time(server):
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + b"x-filler: " + b"a" * 20_000 + b"\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 431")
    with connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        assert read_all(connection) == b""
    with connect(server) as connection:
        connection.sendall(b"no http at all\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 400") and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]


def test_many_requests_on_one_connection_are_no_long_head(server):
    request = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(request * 500 + request.replace(b"host: x", b"host: x\r\nconnection: close"))
        assert read_all(connection).count(b'{"status": "ok"}') == 501


def test_too_many_prompts_are_refused(client):
    answer = complete(client, prompt=["a"] * 5)
    assert answer.status_code == 400 and error_of(answer)["param"] == "prompt"


def test_an_echo_may_be_all_that_is_wanted(client):
    answer = complete(client, prompt=["def add", "b"], echo=True, max_tokens=0, logprobs=1).json()
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[0] == "def add" and [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 2
    told = answer["choices"][0]["logprobs"]
    assert told["tokens"] == ["def", " add"] and told["text_offset"] == [0, 3]
    assert told["token_logprobs"][0] is None and told["token_logprobs"][1] < 0
    assert answer["usage"]["completion_tokens"] == 0
    ids = complete(client, prompt=[[3, 4], [70]], echo=True, max_tokens=0).json()
    texts = [client.post("/detokenize", json={"tokens": one}).json()["prompt"] for one in ([3, 4], [70])]
    assert [choice["text"] for choice in ids["choices"]] == texts


def test_an_echo_tells_one_token_more_even_if_it_ends_the_text(client, server):
    end = server.model.tokenizer.end_of_text_id
    bias = {str(end): 100}
    answer = complete(client, echo=True, max_tokens=1, logprobs=1, logit_bias=bias).json()["choices"][0]
    assert answer["text"] == "def add" and answer["finish_reason"] == "stop"
    assert answer["logprobs"]["tokens"] == ["def", " add", "<|endoftext|>"]
    events = read_stream(client, FIELDS | {"echo": True, "max_tokens": 1, "logprobs": 1, "logit_bias": bias})
    assert json.loads(events[0][6:])["choices"][0] == answer


def test_offsets_tell_where_tokens_start_in_the_text(client):
    text = "a\u6f22b\u5b57"
    told = complete(client, prompt=text, echo=True, max_tokens=0, logprobs=0).json()["choices"][0]["logprobs"]
    starts = [text.encode()[: len(b"".join(map(to_bytes, told["tokens"][:idx])))] for idx in range(len(told["tokens"]))]
    assert told["text_offset"] == [len(start.decode(errors="ignore")) for start in starts]
    assert any(token.startswith("bytes:") for token in told["tokens"])


def to_bytes(token):
    if token.startswith("bytes:"):
        return bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
    return token.encode()


def test_texts_are_tokens_and_tokens_texts(client):
    text = "def add(left) <|endoftext|> \u6f22"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 256
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    # A name alone is looked up; within a text it is one only if asked for.
    assert client.post("/tokenize", json={"prompt": "<|endoftext|>"}).json()["tokens"] == [0]
    special = client.post("/tokenize", json={"prompt": "a<|endoftext|>", "parse_special": True}).json()["tokens"]
    assert special[-1] == 0
    assert client.post("/tokenize", json={"prompt": "<|endoftext|>", "parse_special": False}).json()["count"] > 1
    for fields, param in (({"tokens": [300]}, "tokens"), ({"tokens": ["a"]}, "tokens[0]")):
        assert error_of(client.post("/detokenize", json=fields))["param"] == param


def test_a_conversation_needs_a_template(client):
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}]})
    assert answer.status_code == 400 and error_of(answer)["code"] == "no_chat_template"


def test_routing_of_a_request_changes_its_text_alone(client):
    texts = {
        str(routing): complete(client, routing=routing, max_tokens=12).json()["choices"][0]["text"]
        for routing in (None, "deployed", {"k": 2}, "top_k=2", {"dense": True}, "dense", {"ffn": {"threshold": 1.5}})
    }
    assert texts["None"] == texts["deployed"] == texts["{'k': 2}"] == texts["top_k=2"]
    assert texts["{'dense': True}"] == texts["dense"] != texts["None"]
    assert error_of(complete(client, routing={"k": 1, "dense": True}))["param"] == "routing"


def test_a_deadline_ends_a_call_and_frees_its_place(client, server, held):
    for headers in ({"x-request-timeout-ms": "150"}, {"grpc-timeout": "150m"}):
        started_s = time.monotonic()
        answer = complete(client, headers=headers)
        assert answer.status_code == 504 and error_of(answer)["code"] == "deadline_exceeded"
        assert 0.1 < time.monotonic() - started_s < 2
    held.set()
    wait_until(lambda: is_idle(server))
    for headers in ({"x-request-timeout-ms": "0"}, {"x-request-timeout-ms": "1e3"}, {"grpc-timeout": "5"}):
        assert error_of(complete(client, headers=headers))["param"] == next(iter(headers))


def test_a_deadline_within_a_stream_is_an_event(client, server):
    def hold_later():
        wait_until(lambda: server.pool.engine.status.num_generated_tokens > before)
        server.pool.hold.clear()

    before = server.pool.engine.status.num_generated_tokens
    holder = threading.Thread(target=hold_later)
    holder.start()
    try:
        lines = read_stream(client, LONG, headers={"x-request-timeout-ms": "400"})
    finally:
        holder.join()
        server.pool.hold.set()
    assert lines[0].startswith("data: ") and lines[-2] == "event: error" and "data: [DONE]" not in lines
    assert json.loads(lines[-1][6:])["error"]["code"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (EngineFullError("no room"), 429, "rate_limit_exceeded"),
        (ExpertUnavailableError("expert 3 is gone"), 503, "unavailable"),
        (DsmoeError("broken"), 500, "internal_error"),
        (ZeroDivisionError("secret"), 500, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_a_router_has_a_status(client, failing, error, status, code):
    failing(error)
    for stream in (False, True):
        answer = complete(client, stream=stream)
        assert answer.status_code == status and error_of(answer)["code"] == code
        assert ("retry-after" in answer.headers) == (status in (429, 503))
        assert "secret" not in answer.text


def test_a_client_that_leaves_frees_its_place_within_a_second(server, held):
    body = json.dumps(LONG).encode()
    for leave in (socket.socket.close, lambda connection: connection.shutdown(socket.SHUT_WR)):
        connection = connect(server)
        connection.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_until(lambda: server.pool.num_under_way == 1)
        leave(connection)
        assert wait_until(lambda: not server.gateway.admission.num_sequences) < 1
        held.set()
        wait_until(lambda: is_idle(server))
        held.clear()
        connection.close()
    assert len(server.pool.canceled) >= 2


def test_a_full_server_refuses_at_once_and_is_open_again_at_once(directory):
    with run_gateway(directory, max_sequences=2) as server, ThreadPoolExecutor(2) as pool:
        server.pool.hold.clear()
        accepted = [pool.submit(httpx.post, f"{server.url}/v1/completions", json=FIELDS, timeout=30) for _ in range(2)]
        wait_until(lambda: server.gateway.admission.num_sequences == 2)
        with httpx.Client(base_url=server.url) as client:
            answers, durations_s = [], []
            for _ in range(21):
                started_s = time.monotonic()
                answers.append(complete(client))
                durations_s.append(time.monotonic() - started_s)
            # The median, as other tests may share the machine.
            assert sorted(durations_s)[10] < 0.05
            assert {answer.status_code for answer in answers} == {429}
            assert int(answers[0].headers["retry-after"]) >= 1 and error_of(answers[0])["type"] == "rate_limit_error"
            server.pool.hold.set()
            assert [one.result().status_code for one in accepted] == [200, 200]
            assert complete(client).status_code == 200


def test_more_tokens_than_there_are_is_no_reason_to_come_again(directory):
    with run_gateway(directory, max_queued_tokens=100) as server, httpx.Client(base_url=server.url) as client:
        answer = complete(client, max_tokens=200)
        assert answer.status_code == 400 and error_of(answer)["param"] == "max_tokens"
        assert complete(client, max_tokens=20).status_code == 200


def test_draining_ends_what_runs_and_refuses_the_rest(directory):
    with (
        run_gateway(directory) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        server.pool.hold.clear()
        running = pool.submit(read_stream, client, FIELDS)
        wait_until(lambda: server.gateway.admission.num_sequences == 1)
        server.gateway.begin_drain()
        with httpx.Client(base_url=server.url) as other:
            answer = complete(other)
            assert (
                answer.status_code == 503 and answer.headers["retry-after"] and error_of(answer)["code"] == "stopping"
            )
            assert other.get("/ready").status_code == 503 and other.get("/health").status_code == 200
        server.pool.hold.set()
        server.call(server.gateway.drain(timeout_s=20))
        assert running.result()[-1] == "data: [DONE]"


def test_draining_does_not_wait_for_ever(directory):
    with (
        run_gateway(directory) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        server.pool.hold.clear()
        running = pool.submit(complete, client)
        wait_until(lambda: server.gateway.admission.num_sequences == 1)
        server.call(server.gateway.drain(timeout_s=0.1))
        assert running.result().status_code == 503


def test_a_server_that_lacks_something_is_not_ready(client, server):
    server.unready = "2 experts have no host"
    answer = client.get("/ready")
    server.unready = None
    assert answer.status_code == 503 and "2 experts have no host" in error_of(answer)["message"]


def test_all_but_health_can_be_denied(directory):
    def deny(headers):
        if headers.get("authorization") != "Bearer right":
            raise ApiError("no key.", status=401, code="invalid_api_key")

    with run_gateway(directory, authorize=deny) as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").status_code == 200
        for path in ("/ready", "/metrics", "/v1/models", "/nothing", "/version", "/tokenizer_info"):
            assert client.get(path).status_code == 401
        assert complete(client).status_code == 401
        assert complete(client, headers={"authorization": "Bearer right"}).status_code == 200


def test_metrics_count_calls_and_tokens(directory):
    with run_gateway(directory) as server, httpx.Client(base_url=server.url) as client:
        complete(client)
        complete(client, n=0)
        read_stream(client, FIELDS)
        text = client.get("/metrics").text
    for line in (
        'dsmoe_gateway_requests_total{route="/v1/completions",status="200"} 2.0',
        'dsmoe_gateway_requests_total{route="/v1/completions",status="400"} 1.0',
        "dsmoe_gateway_prompt_tokens_total 4.0",
        "dsmoe_gateway_generated_tokens_total 12.0",
        "dsmoe_gateway_time_to_first_token_seconds_count 2.0",
        "dsmoe_gateway_sequences 0.0",
    ):
        assert line in text.splitlines()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(
    "prompt max_tokens n stream stream_options stop logit_bias logprobs echo seed top_k temperature routing "
    "stop_token_ids model messages best_of tokens user suffix".split()
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    fields=st.dictionaries(NAMES, JSON, max_size=4),
    base=st.sampled_from([{}, FIELDS]),
)
def test_no_body_breaks_the_server(client, path, fields, base):
    answer = client.post(
        path,
        content=json.dumps(base | fields),
        headers={"content-type": "application/json", "x-request-timeout-ms": "9000"},
    )
    assert answer.status_code in (200, 400, 404, 429), (fields, answer.text)
    if answer.status_code != 200:
        error_of(answer)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=200))
def test_no_bytes_break_the_server(client, content):
    answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error_of(answer)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    head=st.sampled_from(
        [b"", HEAD, HEAD + b"content-length: 40\r\n\r\n", HEAD + b"transfer-encoding: chunked\r\n\r\n"]
    ),
    rest=st.binary(max_size=60),
)
def test_no_bytes_on_a_connection_break_the_server(client, server, head, rest):
    with connect(server) as connection:
        connection.sendall(head + rest)
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


def test_nothing_is_left_after_all_of_this(client, server):
    wait_until(lambda: is_idle(server))
    assert client.get("/health").status_code == 200
