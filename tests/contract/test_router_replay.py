"""Gateway and routers together: what a consumer reads does not depend on which routers are lost, and when."""

import asyncio
import itertools

import pytest

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import SamplingConfig
from tests.fakes.router_cluster import RouterCluster, read, run_alone
from tests.fakes.tiny_artifact import TEXT, write_tiny_artifact

LONG_S = 60.0
SEEDED = {"temperature": 1.0, "seed": 7}
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_tiny_artifact(tmp_path_factory.mktemp("tiny"), max_seq_len=96)


@pytest.fixture(scope="module")
def engine(artifact):
    return load_engine(load_artifact(artifact), EngineConfig(num_blocks=64))


@pytest.fixture(params=["memory", "unix"])
def cluster(request, artifact, tmp_path):
    cluster = RouterCluster(artifact, tmp_path, scheme=request.param)
    yield cluster
    cluster.close()


def make_request(engine, *, sampling=None, max_tokens=40, **fields):
    prompt = [int(token) for token in engine.tokenizer.encode(TEXT)[:12]]
    return GenerationRequest(
        prompt_ids=prompt, max_tokens=max_tokens, sampling=SamplingConfig(**(sampling or {})), ignore_eos=True, **fields
    )


def by_sequence(outputs):
    """Return outputs by sequence, without the name of the request."""
    found = {}
    for output in outputs:
        found.setdefault(output.sequence_idx, []).append(
            tuple(
                getattr(output, name) for name in ("token", "text", "prompt_logprobs", "finish_reason", "stop_reason")
            )
        )
    return found


def undisturbed(engine, request):
    return by_sequence(itertools.chain(*run_alone(engine, request).values()))


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, LONG_S))


def test_a_request_through_a_router_is_a_request_to_its_engine(cluster, engine):
    request = make_request(engine, sampling=SEEDED, n=3)
    cluster.start(0)

    async def generate():
        pool = cluster.open_pool(0)
        outputs = await read(pool, "a", request)
        pool.close()
        return outputs

    outputs = run(generate())
    assert {output.request_id for output in outputs} == {"a"}
    assert by_sequence(outputs) == undisturbed(engine, request)


def stop_in(engine, request):
    """Return a stop string that ends the text of a request late, and one that often begins and never ends."""
    (outputs,) = run_alone(engine, request).values()
    text = "".join(output.text for output in outputs)
    return (text[len(text) * 2 // 3 :][:4], text[:2] + "\x00")


KINDS = {
    "greedy": make_request,
    "seeded": lambda engine: make_request(engine, sampling=SEEDED),
    "stop string": lambda engine: make_request(
        engine, sampling=SEEDED, stop=stop_in(engine, make_request(engine, sampling=SEEDED))
    ),
    "three": lambda engine: make_request(engine, sampling=SEEDED, n=3),
    "log probabilities": lambda engine: make_request(engine, sampling=SEEDED | {"logprobs": 2}),
    "echo": lambda engine: make_request(engine, sampling=SEEDED | {"logprobs": 0}, prompt_logprobs=3, n=2),
    "only the prompt": lambda engine: make_request(engine, max_tokens=0, prompt_logprobs=1),
    "penalties": lambda engine: make_request(
        engine, sampling=SEEDED | {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "logit_bias": {40: 3.0}}
    ),
    "end of text": lambda engine: make_request(
        engine, sampling=SEEDED, stop_token_ids=[token_at(engine, make_request(engine, sampling=SEEDED), 30)]
    ),
}


def token_at(engine, request, place):
    """Return a token of a request's text that it did not have before, from a place on."""
    (outputs,) = run_alone(engine, request).values()
    ids = [output.token.token_id for output in outputs]
    return next(token for idx, token in enumerate(ids) if idx >= place and token not in ids[:idx])


@pytest.mark.parametrize("num_steps", [0, 1, 7, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_a_router_lost_in_midstream_changes_nothing_that_is_read(cluster, engine, kind, num_steps):
    request = KINDS[kind](engine)
    paced = cluster.start(0, num_steps=num_steps)

    async def generate():
        pool = cluster.open_pool(0, 1)
        reading = asyncio.create_task(read(pool, "a", request))
        still = asyncio.create_task(asyncio.to_thread(paced.is_still.wait, LONG_S))
        await asyncio.wait([reading, still], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.to_thread(cluster.kill, 0)
        await asyncio.to_thread(cluster.start, 1)
        outputs = await reading
        paced.is_still.set()
        pool.close()
        return outputs

    assert by_sequence(run(generate())) == undisturbed(engine, request)
