"""The gRPC API by a client of its own: what it streams, how it refuses, what a client that leaves costs."""

import asyncio
import socket
from contextlib import asynccontextmanager

import grpc
import pytest

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.errors import UserError
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import SampledToken, SamplingConfig
from dsmoe_ray.serving import grpc_messages as messages
from dsmoe_ray.serving.config import GrpcConfig, HttpConfig, ServingConfig
from dsmoe_ray.serving.gateway import Gateway
from dsmoe_ray.serving.grpc_api import GENERATION, HEALTH, GrpcApi
from dsmoe_ray.serving.openai_api.errors import ApiError
from dsmoe_ray.serving.openai_api.served_model import load_served_model
from dsmoe_ray.serving.single_process import run_single_process
from tests.fakes.router_cluster import RouterCluster, run_alone
from tests.fakes.tiny_artifact import TEXT, write_tiny_artifact

LONG_S = 60.0
PROMPT = TEXT[:20]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_tiny_artifact(tmp_path_factory.mktemp("tiny") / "tiny", max_seq_len=96)


@pytest.fixture(scope="module")
def engine(artifact):
    return load_engine(load_artifact(artifact), EngineConfig(num_blocks=64))


@pytest.fixture
def cluster(artifact, tmp_path):
    cluster = RouterCluster(artifact, tmp_path)
    yield cluster
    cluster.close()


class Client:
    """What ``protoc`` would make of the schema."""

    def __init__(self, channel):
        self.generate = channel.unary_stream(
            f"/{GENERATION}/Generate",
            request_serializer=messages.GenerateRequest.SerializeToString,
            response_deserializer=messages.GenerateReply.FromString,
        )
        self.list_models = channel.unary_unary(
            f"/{GENERATION}/ListModels",
            request_serializer=messages.ListModelsRequest.SerializeToString,
            response_deserializer=messages.ListModelsReply.FromString,
        )
        self.check = channel.unary_unary(
            f"/{HEALTH}/Check",
            request_serializer=messages.HealthCheckRequest.SerializeToString,
            response_deserializer=messages.HealthCheckResponse.FromString,
        )

    async def read(self, metadata=None, timeout=LONG_S, **fields):
        """Return all outputs of a call."""
        request = messages.GenerateRequest(**fields)
        return [
            output
            async for reply in self.generate(request, metadata=metadata, timeout=timeout)
            for output in reply.outputs
        ]


@asynccontextmanager
async def serving(artifact, cluster, *, authorize=None, max_sequences=32, **http):
    """Serve a cluster's routers 0; yield a client and the gateway."""
    pool = cluster.open_pool(0)
    gateway = Gateway(pool, load_served_model(artifact), HttpConfig(**http), max_sequences=max_sequences)
    api = GrpcApi(gateway, GrpcConfig(port=0), authorize=authorize)
    address = await api.start()
    async with grpc.aio.insecure_channel(address) as channel:
        yield Client(channel), gateway
    await api.stop()
    pool.close()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, LONG_S))


async def refused(call):
    """Return the code, the message and the trailing metadata of a call that fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details(), dict(caught.value.trailing_metadata())


def to_scored(told):
    return SampledToken(told.token_id, told.logprob, tuple((one.token_id, one.logprob) for one in told.top_logprobs))


def test_a_call_streams_what_the_engine_says(artifact, cluster, engine):
    cluster.start(0)
    ids = [int(token) for token in engine.tokenizer.encode(PROMPT)]
    sampling = {"temperature": 0.9, "seed": 5, "top_k": 50, "logit_bias": {40: 2.0}, "presence_penalty": 0.5}
    request = GenerationRequest(
        prompt_ids=ids,
        max_tokens=20,
        n=2,
        sampling=SamplingConfig(**sampling, logprobs=2),
        prompt_logprobs=2,
        ignore_eos=True,
    )

    async def call():
        async with serving(artifact, cluster) as (client, _):
            fields = {"max_tokens": 20, "n": 2, "logprobs": 2, "score_prompt": True, "ignore_eos": True, **sampling}
            return await client.read(text=PROMPT, **fields), await client.read(token_ids={"ids": ids}, **fields)

    for told in run(call()):
        for idx, expected in run_alone(engine, request).items():
            outputs = [output for output in told if output.sequence == idx]
            assert [to_scored(output) for output in outputs] == [output.token for output in expected]
            assert [output.text for output in outputs] == [output.text for output in expected]
            scores = [tuple(to_scored(score) for score in output.prompt_logprobs) for output in outputs]
            assert scores == [output.prompt_logprobs or () for output in expected]
            assert [output.finish_reason for output in outputs] == [0] * 19 + [messages.FINISH_REASONS["length"]]


def test_a_prompt_can_be_scored_alone_and_a_text_ends_where_it_is_told_to(artifact, cluster, engine):
    cluster.start(0)

    async def call():
        async with serving(artifact, cluster) as (client, _):
            scored = await client.read(text=PROMPT, max_tokens=0, score_prompt=True)
            whole = await client.read(text=PROMPT, max_tokens=30, temperature=0, ignore_eos=True)
            text = "".join(output.text for output in whole)
            ended = await client.read(text=PROMPT, max_tokens=30, temperature=0, ignore_eos=True, stop=[text[9:12]])
            last = whole[0].token_id
            stopped = await client.read(text=PROMPT, temperature=0, stop_token_ids=[last])
            return scored, text, ended, stopped, last

    scored, text, ended, stopped, last = run(call())
    assert len(scored) == 1 and len(scored[0].prompt_logprobs) == len(engine.tokenizer.encode(PROMPT)) - 1
    assert not scored[0].HasField("token_id")
    assert "".join(output.text for output in ended) == text[: text.index(text[9:12])]
    assert (ended[-1].stop_string, ended[-1].finish_reason) == (text[9:12], messages.FINISH_REASONS["stop"])
    assert (len(stopped), stopped[0].stop_token_id, stopped[0].HasField("token_id")) == (1, last, False)


def test_a_call_that_comes_again_with_its_id_has_the_same_tokens(artifact, cluster):
    cluster.start(0)

    async def call():
        async with serving(artifact, cluster) as (client, _):
            names = ("one", "one", "another")
            return [
                [output.token_id for output in await client.read([("x-request-id", name)], text=PROMPT, max_tokens=20)]
                for name in names
            ]

    one, again, another = run(call())
    assert one == again != another


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "INVALID_ARGUMENT", "prompt"),
        ({"text": "a", "n": 1000}, "INVALID_ARGUMENT", "n"),
        ({"text": "a", "top_p": 2.0}, "INVALID_ARGUMENT", "top_p"),
        ({"text": "a", "temperature": float("nan")}, "INVALID_ARGUMENT", "temperature"),
        ({"token_ids": {"ids": [5, 300]}}, "INVALID_ARGUMENT", "prompt"),
        ({"text": "a" * 10_000}, "INVALID_ARGUMENT", "prompt"),
        ({"text": "a", "routing": "magic"}, "INVALID_ARGUMENT", "routing"),
        ({"text": "a", "model": "another"}, "NOT_FOUND", "model"),
    ],
    ids=["no prompt", "n", "top_p", "NaN", "foreign token", "too long", "routing", "model"],
)
def test_a_wrong_field_is_refused_by_name(artifact, cluster, fields, code, param):
    cluster.start(0)

    async def call():
        async with serving(artifact, cluster) as (client, _):
            return await refused(client.read(**fields)), await client.read(text="a", max_tokens=2)

    (found, details, metadata), others = run(call())
    assert (found.name, metadata["dsmoe-param"]) == (code, param) and details
    assert others


def test_more_than_there_is_room_for_is_refused_with_a_time_to_come_again(artifact, cluster):
    cluster.start(0, num_steps=3)

    async def call():
        async with serving(artifact, cluster, max_sequences=1) as (client, gateway):
            request = messages.GenerateRequest(text=PROMPT, max_tokens=40, ignore_eos=True)
            first = client.generate(request)
            await first.read()
            answer = await refused(client.read(text=PROMPT))
            first.cancel()
            gateway.begin_drain()
            return answer, await refused(client.read(text=PROMPT))

    (full, _, metadata), (stopping, _, _) = run(call())
    assert full is grpc.StatusCode.RESOURCE_EXHAUSTED and int(metadata["retry-after"]) >= 1
    assert stopping is grpc.StatusCode.UNAVAILABLE


def test_a_client_that_leaves_or_is_late_frees_its_sequences(artifact, cluster):
    paced = cluster.start(0, num_steps=3)
    router = cluster.routers[0][0]

    async def call():
        async with serving(artifact, cluster) as (client, gateway):
            leaves = client.generate(messages.GenerateRequest(text=PROMPT, max_tokens=40, n=2, ignore_eos=True))
            await leaves.read()
            leaves.cancel()
            assert await asyncio.to_thread(router.wait_until_idle, LONG_S)
            late = await refused(client.read(text=PROMPT, timeout=0.3))
            assert await asyncio.to_thread(router.wait_until_idle, LONG_S)
            return late, gateway.admission.num_sequences

    (code, _, _), num_sequences = run(call())
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert paced.status.num_running == paced.status.num_waiting == num_sequences == 0


def test_without_a_key_there_is_nothing_but_health(artifact, cluster):
    cluster.start(0)

    def authorize(metadata):
        if metadata.get("authorization") != "Bearer key":
            raise ApiError("give a key.", status=401, code="invalid_api_key")

    async def call():
        async with serving(artifact, cluster, authorize=authorize) as (client, gateway):
            key = [("authorization", "Bearer key")]
            models = await client.list_models(messages.ListModelsRequest(), metadata=key)
            served = await client.read(key, text="a", max_tokens=1)
            refusals = [await refused(client.read(text="a")), await refused(client.list_models(models))]
            health = [(await client.check(messages.HealthCheckRequest())).status]
            gateway.begin_drain()
            health.append((await client.check(messages.HealthCheckRequest(service=GENERATION))).status)
            unknown = await refused(client.check(messages.HealthCheckRequest(service="other")))
            return models.models[0], served, refusals, health, unknown

    model, served, refusals, health, unknown = run(call())
    assert (model.name, model.max_seq_len, model.vocab_size) == ("tiny", 96, 300)
    assert served and health == [1, 2]
    assert {code for code, _, _ in refusals} == {grpc.StatusCode.UNAUTHENTICATED}
    assert unknown[0] is grpc.StatusCode.NOT_FOUND


def test_one_process_serves_grpc_beside_http_where_a_port_is_given(artifact):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

        async def call():
            config = ServingConfig(artifact=artifact, http=HttpConfig(port=0), grpc=GrpcConfig(port=port))
            with pytest.raises(UserError, match=r"grpc\.port"):
                async with run_single_process(config):
                    pass
            taken.close()
            async with run_single_process(config), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                return await Client(channel).read(text="a", max_tokens=2, ignore_eos=True)

        assert len(run(call())) == 2
