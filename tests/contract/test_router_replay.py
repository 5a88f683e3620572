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
