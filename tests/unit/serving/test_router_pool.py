"""Which router a pool asks, and what it makes of routers that fail, hang, lie or die; the test is the routers."""

import asyncio
import itertools
import subprocess
import sys

import pytest

from dsmoe_ray.errors import ConnectionLostError, DeadlineError, DsmoeError
from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.sampling_config import SampledToken
from dsmoe_ray.serving.router_pool import RouterPool
from dsmoe_ray.serving.wire.connection import Frame
from dsmoe_ray.serving.wire.generation_codec import from_frame, to_frame
from dsmoe_ray.serving.wire.messages import Kind, OutputsMessage, RejectedMessage, RouterStatusMessage
from tests.fakes.fake_connection import LONG_S, FakeConnection


class Routers:
    """Each connection that the pool makes to an address, one after the other."""

    def __init__(self, *addresses):
        self.connections, self._made = {}, {}
        self.pool = RouterPool(self._connect, stuck_after_s=10.0)
        for address in addresses:
            self.open(address)

    def open(self, address, *, times=1):
        """Let the pool know a router, which can be lost so many times less one."""
        self.connections[address] = [FakeConnection() for _ in range(times)]
        self._made[address] = itertools.count()
        self.pool.update_routers(self.connections)

    def _connect(self, address):
        made = next(self._made[address])
        if made >= len(self.connections[address]):
            raise ConnectionLostError("nobody listens there")
        return self.connections[address][made]

    @property
    def sessions(self):
        return self.pool._sessions

    async def wait_until_connected(self, number):
        while self.pool.num_connected != number:
            await asyncio.sleep(0.001)

    def start(self, request_id="a", **fields):
        return asyncio.create_task(self._read(request_id, GenerationRequest(**{"prompt_ids": [1] * 10} | fields)))

    async def _read(self, request_id, request):
        return [output async for output in self.pool.generate(request_id, request)]

    def tell(self, address, message, *, connection=0):
        self.connections[address][connection].deliver(to_frame(message))

    def say(self, address, request_id, token, finish_reason=None, *, connection=0, sequence_idx=0):
        output = SequenceOutput(
            request_id=request_id,
            sequence_idx=sequence_idx,
            token=SampledToken(token),
            text=str(token),
            finish_reason=finish_reason,
        )
        self.tell(address, OutputsMessage(outputs=(output,)), connection=connection)

    async def asked(self, address, *kinds, connection=0):
        """Return the next message that the pool sends to a router."""
        return from_frame(await asyncio.to_thread(self.connections[address][connection].next_sent, *kinds))


def play(scene, *addresses):
    async def run():
        routers = Routers(*addresses)
        await routers.wait_until_connected(len(addresses))
        try:
            return await asyncio.wait_for(scene(routers), LONG_S)
        finally:
            routers.pool.close()

    return asyncio.run(run())


def tokens_of(outputs):
    return [output.token.token_id for output in outputs]


def status(**fields):
    return RouterStatusMessage(**{"num_running": 0, "num_waiting": 0, "num_free_tokens": 9} | fields)


def test_a_request_goes_to_the_router_with_the_fewest_tokens_to_come():
    async def scene(routers):
        async def start(name, max_tokens):
            readers.append(routers.start(name, max_tokens=max_tokens))
            await asyncio.sleep(0)
            return next(session.address for session in routers.sessions if name in session.runs)

        async def wait_for_tokens(address, num_tokens):
            while not any(one.num_tokens == num_tokens for one in routers.sessions if one.address == address):
                await asyncio.sleep(0.001)

        readers = []
        # Those of another gateway.
        routers.tell("b", status(num_outstanding_tokens=20))
        await wait_for_tokens("b", 20)
        went = [await start("large", 30), await start("small", 5), await start("next", 5)]
        # The first one's prompt is computed and most of its tokens are there.
        for token in range(28):
            routers.say("a", "large", token)
        await wait_for_tokens("a", 2)
        went.append(await start("last", 5))
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        await wait_for_tokens("a", 0)
        return went

    assert play(scene, "a", "b") == ["a", "b", "b", "a"]


LIES = {
    "a sequence too many": lambda routers: routers.say("a", "a", 9, sequence_idx=1),
    "a message for routers": lambda routers: routers.connections["a"][0].deliver(Frame(Kind.CANCEL, {"ids": []})),
    "an unknown kind": lambda routers: routers.connections["a"][0].deliver(Frame(99, {})),
    "a wrong field": lambda routers: routers.connections["a"][0].deliver(Frame(Kind.OUTPUTS, {"ids": ["a"]})),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_router_that_sends_what_cannot_be_is_cut_off_and_its_sequences_go_on_elsewhere(lie):
    async def scene(routers):
        reading = routers.start(max_tokens=3)
        first = await routers.asked("a")
        routers.say("a", first.request_id, 11)
        LIES[lie](routers)
        routers.open("b")
        again = await routers.asked("b")
        assert routers.connections["a"][0].is_closed.is_set()
        routers.say("b", again.request_id, 12)
        routers.say("b", again.request_id, 13, "length")
        return again, await reading

    again, outputs = play(scene, "a")
    assert (again.request.generated_ids, again.request.n) == ((11,), 1) and again.request_id != "a"
    assert tokens_of(outputs) == [11, 12, 13]
    assert {(output.request_id, output.sequence_idx) for output in outputs} == {("a", 0)}


def test_what_comes_late_for_a_sequence_that_went_elsewhere_is_not_read():
    async def scene(routers):
        reading = routers.start(max_tokens=3)
        (address, other) = ("a", "b") if await _is_asked(routers, "a") else ("b", "a")
        routers.tell(address, status(leaving=True))
        again = await routers.asked(other, Kind.GENERATE)
        routers.say(address, "a", 11)
        for token in (21, 22):
            routers.say(other, again.request_id, token)
        routers.say(other, again.request_id, 23, "length")
        return await reading

    assert tokens_of(play(scene, "a", "b")) == [21, 22, 23]


async def _is_asked(routers, address):
    await asyncio.sleep(0)
    return any(one.runs for one in routers.sessions if one.address == address)


def test_a_router_whose_step_does_not_end_loses_what_it_has_until_it_moves_on():
    async def scene(routers):
        reading = routers.start(max_tokens=1)
        stuck, other = ("a", "b") if await _is_asked(routers, "a") else ("b", "a")
        routers.tell(stuck, status(step_age_ms=10_000))
        again = await routers.asked(other, Kind.GENERATE)
        await routers.wait_until_connected(1)
        routers.say(other, again.request_id, 5, "length")
        routers.tell(stuck, status(step_age_ms=20))
        await routers.wait_until_connected(2)
        return await reading

    assert tokens_of(play(scene, "a", "b")) == [5]


def test_a_request_that_fails_everywhere_fails_and_others_are_tried_first():
    async def scene(routers):
        reading = routers.start(max_tokens=1)
        asked = []
        here = "a" if await _is_asked(routers, "a") else "b"
        for _ in range(3):
            message = await routers.asked(here, Kind.GENERATE)
            asked.append(here)
            routers.tell(here, RejectedMessage(request_id=message.request_id, reason="failed", message="a bug"))
            here = "b" if here == "a" else "a"
        with pytest.raises(DsmoeError, match="given up after 3 attempts without a token; the last: a bug"):
            await reading
        return asked

    asked = play(scene, "a", "b")
    assert asked in (["a", "b", "a"], ["b", "a", "b"])


def test_a_request_that_no_router_survives_is_given_up():
    async def scene(routers):
        routers.open("a", times=10)
        reading = routers.start(max_tokens=1)
        for number in range(9):
            await routers.asked("a", Kind.GENERATE, connection=number)
            routers.connections["a"][number].close()
        with pytest.raises(DsmoeError, match=r"given up after 9 attempts.*router a is lost"):
            await reading

    play(scene)


def test_a_request_that_moves_on_survives_any_number_of_lost_routers():
    async def scene(routers):
        routers.open("a", times=12)
        reading = routers.start(max_tokens=12)
        for number in range(12):
            message = await routers.asked("a", Kind.GENERATE, connection=number)
            routers.say("a", message.request_id, number, "length" if number == 11 else None, connection=number)
            routers.connections["a"][number].close()
        return await reading

    assert tokens_of(play(scene)) == list(range(12))


def test_a_router_that_let_a_request_go_for_its_deadline_ends_it():
    async def scene(routers):
        reading = routers.start(max_tokens=1)
        await routers.asked("a")
        routers.tell("a", RejectedMessage(request_id="a", reason="expired", message="too late"))
        with pytest.raises(DeadlineError, match="too late"):
            await reading

    play(scene, "a")


def test_a_router_that_is_no_longer_named_is_let_go():
    async def scene(routers):
        reading = routers.start(max_tokens=1)
        here, other = ("a", "b") if await _is_asked(routers, "a") else ("b", "a")
        routers.pool.update_routers([other])
        message = await routers.asked(other, Kind.GENERATE)
        routers.say(other, message.request_id, 7, "length")
        assert routers.connections[here][0].is_closed.is_set()
        assert routers.pool.statistics.num_lost_routers == 0
        return await reading

    assert tokens_of(play(scene, "a", "b")) == [7]


def test_a_gateway_loads_no_torch_with_its_pool():
    script = (
        "import sys, dsmoe_ray.serving.router_pool, dsmoe_ray.serving.wire.transport\n"
        "assert not {'torch', 'ray'} & set(sys.modules), 'a heavy library was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
