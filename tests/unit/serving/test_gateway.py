import asyncio
import subprocess
import sys

import pytest

from dsmoe_ray.errors import DsmoeError
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.serving.config import HttpConfig
from dsmoe_ray.serving.gateway import Gateway
from dsmoe_ray.serving.openai_api.errors import ApiError
from dsmoe_ray.serving.openai_api.requests import PlannedCall, PlannedPrompt
from dsmoe_ray.serving.openai_api.served_model import load_served_model
from tests.fakes.scripted_pool import ScriptedPool, make_output
from tests.fakes.tiny_artifact import write_tiny_artifact

LAST = {"finish_reason": "length"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_served_model(write_tiny_artifact(tmp_path_factory.mktemp("gateway") / "model"))


def make_call(num_prompts=1, n=1):
    request = GenerationRequest(prompt_ids=[1], max_tokens=4, n=n)
    prompts = [PlannedPrompt(request=request) for _ in range(num_prompts)]
    return PlannedCall(request_id="x", is_chat=False, prompts=prompts, n=n, stream=True, include_usage=False)


def run(model, script, **http):
    """Run a script with a gateway and its pool on an event loop."""

    async def main():
        pool = ScriptedPool()
        await asyncio.wait_for(script(Gateway(pool, model, HttpConfig(**http), max_sequences=4), pool), 20)

    asyncio.run(main())


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_reader_gets_everything_that_has_come(model):
    async def script(gateway, pool):
        async with gateway.run(make_call(num_prompts=2), deadline_s=9) as running:
            await settle()
            pool.say(make_output(1, "a"), make_output(2, "b"))
            pool.say(make_output(3, "c"), number=1)
            await settle()
            outputs = await running.next_outputs()
            assert [(prompt, output.text) for prompt, output in outputs] == [(0, "a"), (0, "b"), (1, "c")]
            for number in (0, 1):
                pool.say(make_output(4, "d", **LAST), None, number=number)
            seen = []
            while (outputs := await running.next_outputs()) is not None:
                seen += outputs
            assert len(seen) == 2
        assert pool.deadlines_s == [9, 9] and len({request_id for request_id, _ in pool.requests}) == 2

    run(model, script)


def test_an_error_comes_after_what_came_before_it(model):
    async def script(gateway, pool):
        async with gateway.run(make_call()) as running:
            await settle()
            pool.say(make_output(1, "a"), DsmoeError("broken"))
            await settle()
            assert len(await running.next_outputs()) == 1
            with pytest.raises(DsmoeError, match="broken"):
                await running.next_outputs()

    run(model, script)


def test_a_text_without_an_end_is_an_error(model):
    async def script(gateway, pool):
        async with gateway.run(make_call(n=2)) as running:
            await settle()
            pool.say(make_output(1, "a", **LAST), None)
            await settle()
            assert len(await running.next_outputs()) == 1
            with pytest.raises(DsmoeError, match="1 of 2 texts have no end"):
                await running.next_outputs()

    run(model, script)


def test_leaving_early_lets_the_routers_and_the_room_go(model):
    async def script(gateway, pool):
        with pytest.raises(ZeroDivisionError):
            async with gateway.run(make_call(num_prompts=3)):
                await settle()
                assert gateway.admission.num_sequences == 3
                _ = 1 / 0
        assert sorted(pool.closed) == [0, 1, 2] and gateway.admission.num_sequences == 0

    run(model, script)


def test_what_is_not_taken_on_asks_no_router(model):
    async def script(gateway, pool):
        async with gateway.run(make_call(n=4)):
            await settle()
            with pytest.raises(ApiError) as caught:
                async with gateway.run(make_call()):
                    pass
            assert caught.value.status == 429 and len(pool.requests) == 1

    run(model, script)


def test_room_follows_the_routers_unless_it_is_configured(model):
    async def script(gateway, pool):
        gateway.follow_capacity(1)
        async with gateway.run(make_call()):
            with pytest.raises(ApiError):
                gateway.check_open()
            gateway.follow_capacity(2)
            if gateway.config.max_sequences is None:
                gateway.check_open()
            else:
                with pytest.raises(ApiError):
                    gateway.check_open()

    run(model, script)
    run(model, script, max_sequences=1)


def test_draining_waits_for_what_runs(model):
    async def script(gateway, pool):
        async def read():
            async with gateway.run(make_call()) as running:
                while await running.next_outputs() is not None:
                    pass

        reader = asyncio.create_task(read())
        await settle()
        drain = asyncio.create_task(gateway.drain(timeout_s=10))
        await settle()
        assert gateway.explain_unready() == "the server is stopping" and not drain.done()
        with pytest.raises(ApiError) as caught:
            gateway.check_open()
        assert (caught.value.status, caught.value.retry_after_s) == (503, 1)
        pool.say(make_output(1, "a", **LAST), None)
        await drain
        await reader

    run(model, script)


def test_the_gateway_loads_no_torch_and_no_ray():
    modules = [
        "gateway",
        "http_app",
        "http_server",
        "openai_api.served_model",
        "generation_response",
        "gateway_metrics",
    ]
    script = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module('dsmoe_ray.serving.' + name)\n"
        "assert not {'torch', 'ray', 'grpc'} & set(sys.modules), 'a heavy library was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
