"""Three times more calls than there is room for: those taken on do not notice, the others hear at once."""

import asyncio
import json

import pytest

from dsmoe_ray.clock import monotonic_s
from tests.fakes.gateway_server import run_gateway
from tests.fakes.timed_pool import TimedPool
from tests.fakes.tiny_artifact import write_tiny_artifact

pytestmark = pytest.mark.slow

NUM_PLACES = 8
FIRST_S, NEXT_S, NUM_TOKENS = 0.4, 0.02, 11
"""A call takes 0.6 s: eight places serve 13 calls a second."""
INTERVAL_S, NUM_CALLS = 0.025, 160
BODY = json.dumps({"prompt": "def", "max_tokens": NUM_TOKENS, "stream": True}).encode()
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n" % len(BODY) + BODY
)


async def call(port):
    """Return status, time to the first token or to the refusal, and the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    started_s = monotonic_s()
    writer.write(REQUEST)
    head = await reader.readuntil(b"\r\n\r\n")
    first = await reader.readuntil(b"}")
    duration_s = monotonic_s() - started_s
    rest = await reader.read()
    writer.close()
    return int(head.split()[1]), duration_s, head + first + rest


async def call_too_often(port):
    calls = []
    for _ in range(NUM_CALLS):
        calls.append(asyncio.create_task(call(port)))
        await asyncio.sleep(INTERVAL_S)
    answers = await asyncio.gather(*calls)
    return answers, await call(port)


def test_calls_that_are_taken_on_are_as_fast_as_alone_and_the_rest_is_refused_at_once(tmp_path):
    directory = write_tiny_artifact(tmp_path / "model")
    pool = TimedPool(first_s=FIRST_S, next_s=NEXT_S)
    with run_gateway(directory, pool=pool, max_sequences=NUM_PLACES) as server:
        port = int(server.url.rsplit(":", 1)[1])
        alone_s = max(asyncio.run(call(port))[1] for _ in range(3))
        answers, after = asyncio.run(call_too_often(port))
    taken = [(duration_s, answer) for status, duration_s, answer in answers if status == 200]
    refused = [(duration_s, answer) for status, duration_s, answer in answers if status == 429]
    assert len(taken) + len(refused) == NUM_CALLS and pool.most_under_way == NUM_PLACES
    # What fits is taken: of some four seconds at most a call's length is lost at either end.
    assert len(taken) > NUM_CALLS / 5 and len(refused) > NUM_CALLS / 2
    assert all(b"data: [DONE]" in answer for _, answer in taken)
    assert max(duration_s for duration_s, _ in taken) < 2 * alone_s
    assert all(b"retry-after: " in answer for _, answer in refused)
    # The median, as other tests may share the machine.
    assert sorted(duration_s for duration_s, _ in refused)[len(refused) // 2] < 0.05
    assert after[0] == 200
