"""Gateway and routers together: what a consumer reads does not depend on which routers are lost, and when."""

import asyncio
import itertools
import random
from contextlib import aclosing

import pytest

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.errors import DeadlineError, DsmoeError, EngineFullError, RequestError
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


@pytest.fixture
def cluster(request, artifact, tmp_path):
    cluster = RouterCluster(artifact, tmp_path, scheme=getattr(request, "param", "unix"))
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


@pytest.mark.parametrize("cluster", ["memory", "unix"], indirect=True)
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


@pytest.mark.parametrize(
    ("cluster", "num_steps"), [("unix", 0), ("memory", 1), ("unix", 7), ("memory", 24)], indirect=["cluster"]
)
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


def steps_of(rng):
    """Return after how many steps a router stands still; mostly in the midst of its requests."""
    return rng.choice([0, 1, 2, rng.randrange(3, 20), rng.randrange(20, 60)])


async def disturb(cluster, rng, *, times):
    """Lose routers in every way, again and again: in midstream, leaving, standing still."""
    for _ in range(times):
        number = rng.randrange(3)
        router, _, engine = cluster.routers[number]
        await asyncio.to_thread(engine.is_still.wait, 0.05 * rng.random())
        if rng.random() < 0.3:
            router.leave()
            await asyncio.to_thread(router.wait_until_idle, 0.05 * rng.random())
        await asyncio.to_thread(cluster.kill, number)
        await asyncio.to_thread(cluster.start, number, num_steps=steps_of(rng))
    for number in range(3):
        await asyncio.to_thread(cluster.kill, number)
        await asyncio.to_thread(cluster.start, number)


@pytest.mark.parametrize(("cluster", "seed"), [("unix", 0), ("memory", 1), ("unix", 3)], indirect=["cluster"])
def test_whatever_happens_to_routers_every_stream_is_what_it_would_have_been(cluster, engine, seed):
    rng = random.Random(seed)
    requests = [rng.choice(list(KINDS.values()))(engine) for _ in range(16)]
    for number in range(3):
        cluster.start(number, num_steps=steps_of(rng))

    async def read_later(pool, number, request):
        await asyncio.sleep(0.3 * rng.random())
        return await read(pool, f"r{number}", request)

    async def generate():
        pool = cluster.open_pool(0, 1, 2)
        disturbing = asyncio.create_task(disturb(cluster, rng, times=15))
        outputs = await asyncio.gather(*(read_later(pool, *numbered) for numbered in enumerate(requests)))
        await disturbing
        pool.close()
        return outputs, pool.statistics

    outputs, statistics = run(generate())
    assert statistics.num_moved_sequences >= 10
    for number, request in enumerate(requests):
        assert {output.request_id for output in outputs[number]} == {f"r{number}"}
        assert by_sequence(outputs[number]) == undisturbed(engine, request)


def test_a_leaving_router_gives_its_sequences_away_and_is_idle_then(cluster, engine):
    request = make_request(engine, sampling=SEEDED, n=2)
    cluster.start(0, num_steps=5)

    async def generate():
        pool = cluster.open_pool(0, 1, stuck_after_s=2 * LONG_S)
        async with aclosing(pool.generate("a", request)) as stream:
            outputs = [await anext(stream)]
            leaving = cluster.routers[0][0]
            await asyncio.to_thread(cluster.start, 1)
            leaving.leave()
            outputs += [output async for output in stream]
        is_idle = await asyncio.to_thread(leaving.wait_until_idle, LONG_S)
        others = await read(pool, "b", request)
        pool.close()
        return outputs, others, is_idle

    outputs, others, is_idle = run(generate())
    assert is_idle and by_sequence(outputs) == by_sequence(others) == undisturbed(engine, request)


def test_a_router_that_hangs_loses_its_sequences_to_another_one(artifact, tmp_path, engine):
    request = make_request(engine, sampling=SEEDED)
    cluster = RouterCluster(artifact, tmp_path, silent=[0])
    cluster.start(0)
    cluster.start(1)

    async def generate():
        pool = cluster.open_pool(0, hung_after_s=0.2)
        reading = asyncio.create_task(read(pool, "a", request))
        await asyncio.sleep(0.1)
        pool.update_routers([cluster.address(0), cluster.address(1)])
        outputs = await reading
        pool.close()
        return outputs

    assert by_sequence(run(generate())) == undisturbed(engine, request)
    cluster.close()


def test_a_stream_that_nobody_reads_any_more_is_in_no_later_step(cluster, engine):
    request = make_request(engine, max_tokens=80, n=2)
    paced = cluster.start(0, num_steps=4)

    async def generate():
        pool = cluster.open_pool(0)
        async with aclosing(pool.generate("a", request)) as stream:
            await anext(stream)
            await asyncio.to_thread(paced.is_still.wait, LONG_S)
        router = cluster.routers[0][0]
        assert await asyncio.to_thread(router.wait_until_idle, LONG_S)
        pool.close()

    run(generate())
    assert paced.status.num_running == 0 and paced.status.num_generated_tokens < 10


def test_without_any_router_a_request_waits_for_one_as_long_as_it_may(cluster, engine):
    request = make_request(engine)

    async def generate():
        pool = cluster.open_pool(0)
        with pytest.raises(DeadlineError, match=r"0\.05 s"):
            await read(pool, "late", request, deadline_s=0.05)
        waiting = asyncio.create_task(read(pool, "a", request, deadline_s=LONG_S))
        await asyncio.sleep(0.05)
        assert pool.lost_addresses == {cluster.address(0)} and pool.num_connected == 0
        await asyncio.to_thread(cluster.start, 0)
        outputs = await waiting
        assert pool.num_connected == 1 and not pool.lost_addresses
        pool.close()
        return outputs

    assert by_sequence(run(generate())) == undisturbed(engine, request)


def test_a_deadline_ends_a_request_in_midstream(cluster, engine):
    cluster.start(0, num_steps=3)

    async def generate():
        pool = cluster.open_pool(0)
        outputs = []
        with pytest.raises(DeadlineError):
            async for output in pool.generate("a", make_request(engine), deadline_s=0.5):
                outputs.append(output)
        pool.close()
        return outputs

    assert 1 <= len(run(generate())) <= 3


def test_full_routers_refuse_new_requests_and_make_room_for_those_under_way(artifact, tmp_path, engine):
    cluster = RouterCluster(artifact, tmp_path, max_num_seqs=1, max_waiting=1)
    request = make_request(engine, sampling=SEEDED)
    paced = [cluster.start(number, num_steps=5) for number in range(2)]

    async def generate():
        pool = cluster.open_pool(0, 1)
        while pool.num_connected < 2:
            await asyncio.sleep(0.001)
        readers = []
        for number in range(4):
            readers.append(asyncio.create_task(read(pool, f"r{number}", request)))
            # It runs or waits before the next one comes.
            while sum(one.status.num_running + one.status.num_waiting for one in paced) <= number:
                await asyncio.sleep(0.001)
            if number == 1:
                for one in paced:
                    await asyncio.to_thread(one.is_still.wait, LONG_S)
        with pytest.raises(EngineFullError):
            await read(pool, "one too many", request)
        await asyncio.to_thread(cluster.kill, 0)
        # Two of the four have to wait until the other router has room.
        paced[1].allow(-1)
        outputs = await asyncio.gather(*readers)
        pool.close()
        return outputs

    for outputs in run(generate()):
        assert by_sequence(outputs) == undisturbed(engine, request)
    cluster.close()


def test_what_the_model_cannot_serve_is_a_request_error_with_its_field(cluster, engine):
    cluster.start(0)

    async def generate():
        pool = cluster.open_pool(0)
        for field, value in (("prompt_ids", [5, 300]), ("prompt_ids", [5] * 96), ("stop_token_ids", [2**40])):
            request = GenerationRequest(**{"prompt_ids": [5], "max_tokens": 3, field: value})
            with pytest.raises(RequestError) as caught:
                await read(pool, "a", request)
            assert caught.value.param == field
        pool.close()

    run(generate())


def test_a_pool_that_closes_fails_what_is_under_way(cluster, engine):
    cluster.start(0, num_steps=2)

    async def generate():
        pool = cluster.open_pool(0)
        reading = asyncio.create_task(read(pool, "a", make_request(engine)))
        waiting = asyncio.create_task(read(cluster.open_pool(), "a", make_request(engine), deadline_s=0.1))
        await asyncio.sleep(0.1)
        pool.close()
        for one in (reading, waiting):
            with pytest.raises(DsmoeError):
                await one
        with pytest.raises(DsmoeError, match="stopped"):
            await read(pool, "b", make_request(engine))

    run(generate())
