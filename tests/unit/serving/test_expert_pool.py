"""Which experts stay and which go, on a tiny artifact with room for three."""

import threading

import pytest
import torch

from dsmoe_ray.artifact.load import Artifact, load_artifact
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.expert_pool import ExpertPool
from tests.fakes.fake_clock import FakeClock
from tests.fakes.host_calls import ALL
from tests.fakes.tiny_artifact import write_tiny_artifact

A, B, C, D = ALL[:4]
WAIT_S = 60.0


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_artifact(tmp_path_factory.mktemp("tiny") / "artifact")


@pytest.fixture
def clock():
    return FakeClock()


@pytest.fixture(params=["mapped", "copied"])
def pool(request, directory, clock):
    return make_pool(directory, clock, dtype=torch.bfloat16 if request.param == "copied" else None)


def make_pool(directory, clock, *, dtype=None, num_experts=3):
    artifact = load_artifact(directory)
    whole = ExpertPool(artifact, dtype=dtype)
    assert whole.capacity == len(ALL)
    return ExpertPool(artifact, memory_bytes=num_experts * whole.expert_bytes + 1, dtype=dtype, now_s=clock)


def use(pool, clock, *experts):
    for expert in experts:
        clock.advance(1.0)
        with pool.pinned(expert.layer, [expert.expert_id]):
            pass


def mask(pool, *expert_ids):
    wanted_E = torch.zeros(pool.num_experts, dtype=torch.bool).numpy()
    wanted_E[list(expert_ids)] = True
    return wanted_E


def test_the_expert_that_was_used_longest_ago_makes_room(pool, clock):
    use(pool, clock, A, B, C, A, D)
    assert set(pool.held) == {A, C, D}
    assert (pool.counts.num_read, pool.counts.num_dropped) == (4, 1)


def test_ordered_experts_stay_while_there_are_others(pool, clock):
    pool.order([A, B])
    use(pool, clock, A, B, C, D)
    assert set(pool.held) == {A, B, D}


def test_a_token_that_waits_takes_the_room_of_ordered_experts_if_it_must(pool, clock):
    pool.order([A, B, C])
    use(pool, clock, A, B, C, D)
    assert set(pool.held) == {B, C, D}
    assert pool.order([A, B, C]) == [A]


def test_an_order_takes_no_room_of_what_was_ordered_too(pool):
    assert pool.order([A, B, C, D]) == [A, B, C, D]
    assert [pool.read(expert) for expert in (A, B, C, D)] == [True, True, True, False]
    assert set(pool.held) == {A, B, C}


def test_only_what_is_idle_and_not_ordered_is_let_go(pool, clock):
    pool.order([A])
    use(pool, clock, A, B, C)
    clock.advance(10.0)
    assert pool.pin(0, mask(pool, C.expert_id)) is None
    pool.drop_idle(5.0)
    assert set(pool.held) == {A, C}
    pool.unpin(0, mask(pool, C.expert_id))
    pool.drop_idle(5.0)
    assert set(pool.held) == {A, C}
    clock.advance(5.0)
    pool.drop_idle(5.0)
    assert pool.held == [A]


def test_pinning_tells_what_is_missing_and_pins_nothing_then(pool, clock):
    use(pool, clock, A)
    assert pool.pin(0, mask(pool, 0, 2, 3)).tolist() == [2, 3]
    clock.advance(10.0)
    pool.drop_idle(5.0)
    assert pool.held == []


def test_what_is_in_use_stays_and_whoever_needs_its_room_waits(pool, clock):
    use(pool, clock, A, B, C)
    assert pool.pin(0, mask(pool, 0, 1, 2)) is None
    waiting = threading.Thread(target=use, args=(pool, clock, D))
    waiting.start()
    assert not pool.read(D)
    assert set(pool.held) == {A, B, C}
    pool.unpin(0, mask(pool, 0, 1, 2))
    waiting.join(WAIT_S)
    assert not waiting.is_alive()
    assert set(pool.held) == {B, C, D}


def test_an_expert_that_two_want_is_read_once_and_others_are_used_meanwhile(pool, clock, monkeypatch):
    use(pool, clock, A)
    read, begun, may_end = pool.memory.read, threading.Semaphore(0), threading.Semaphore(0)

    def read_slowly(expert):
        begun.release()
        assert may_end.acquire(timeout=WAIT_S)
        read(expert)

    monkeypatch.setattr(pool.memory, "read", read_slowly)
    threads = [threading.Thread(target=use, args=(pool, clock, B)) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.acquire(timeout=WAIT_S)
    assert pool.pin(0, mask(pool, 0)) is None
    assert pool.pin(0, mask(pool, 1)).tolist() == [1]
    may_end.release()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert pool.counts.num_read == 2


def test_an_expert_that_cannot_be_read_leaves_its_room_to_others(pool, clock, monkeypatch):
    def fail(expert):
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(pool.memory, "read", fail)
        for expert in (A, B, C, D):
            with pytest.raises(OSError, match="gone"):
                pool.read(expert)
    use(pool, clock, A, B, C)
    assert set(pool.held) == {A, B, C}


def test_experts_come_back_with_the_same_numbers(directory, clock):
    whole = load_artifact(directory)
    for dtype in (torch.float32, torch.bfloat16):
        pool = make_pool(directory, clock, dtype=dtype, num_experts=1)
        for expert in (A, B, ALL[5], A):
            use(pool, clock, expert)
            layer, ids = pool.memory.locate(expert.layer, torch.tensor([[expert.expert_id, -1]]).int().numpy())
            assert ids[0, 1] == -1
            expected = whole.load_experts(expert.layer, [expert.expert_id])[expert.expert_id]["w1"]
            assert torch.equal(pool.memory.layers[layer].w1_EFD[ids[0, 0]], expected.to(dtype))


def test_nothing_of_an_expert_that_is_never_wanted_is_verified_or_read(directory, clock, monkeypatch):
    asked = []
    load = Artifact.load_experts
    monkeypatch.setattr(
        Artifact, "load_experts", lambda self, layer, ids: asked.append((layer, *ids)) or load(self, layer, ids)
    )
    use(make_pool(directory, clock), clock, A, B, A)
    assert asked == [A, B]


def test_memory_for_less_than_one_expert_is_refused(directory):
    with pytest.raises(ConfigError, match=r"memory_bytes=100 .* takes \d+ bytes"):
        ExpertPool(load_artifact(directory), memory_bytes=100)


def test_a_model_without_experts_is_refused(tmp_path):
    ffn = {"kind": "dense", "d_ff": 8}
    with pytest.raises(ConfigError, match=r"dense FFN.*count: 0"):
        ExpertPool(load_artifact(write_tiny_artifact(tmp_path / "dense", ffn=ffn)))
