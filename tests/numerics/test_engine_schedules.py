"""Whatever the schedule, a sequence says what it says alone, to the bit, and what the plain forward pass says.

Exact numerics. Tiny KV caches make sequences lose their blocks, small budgets cut prompts, and prompts begin alike.
"""

import functools
import gc
import random
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.errors import EngineFullError
from dsmoe_ray.inference.sampling_config import SamplingConfig
from tests.fakes.crowd import (
    BLOCK_SIZE,
    Crowd,
    assert_logprobs_are_the_models,
    make_engine,
    make_request,
    run_alone,
    without_names,
)

# Some ten seconds and more as a whole.
pytestmark = pytest.mark.slow

KINDS = ["torch exact", "cpu native"]
BEGINNINGS = [[(7 * idx + 3 * start) % 270 for idx in range(50)] for start in range(2)]
ROUTINGS = ["deployed", "dense", "top_k=2", "attention:top_k=2/ffn:threshold=0.9", "threshold_top_k=1.0"]
SAMPLINGS = [
    SamplingConfig(logprobs=2),
    SamplingConfig(temperature=1.0, seed=5),
    SamplingConfig(temperature=0.8, top_p=0.9, seed=6, logprobs=0),
    SamplingConfig(temperature=1.2, top_k=40, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.5, seed=7),
]


@st.composite
def requests(draw):
    """A prompt of 1 to 60 tokens, many of which begin alike, at and beside the edges of blocks."""
    length = draw(st.sampled_from([0, 15, 16, 17, 32, 33, 48]))
    prompt = draw(st.sampled_from(BEGINNINGS))[:length] + draw(st.lists(st.integers(1, 3), min_size=1, max_size=12))
    prompt_logprobs = draw(st.sampled_from([None, None, None, 1]))
    return make_request(
        prompt,
        max_tokens=draw(st.integers(0 if prompt_logprobs else 1, 36)),
        n=draw(st.sampled_from([1, 1, 2])),
        routing=draw(st.sampled_from(ROUTINGS)),
        sampling=draw(st.sampled_from(SAMPLINGS)),
        stop=draw(st.sampled_from([(), ("a", "e")])),
        ignore_eos=draw(st.booleans()),
        prompt_logprobs=prompt_logprobs,
    )


ARRIVALS = st.lists(st.tuples(st.integers(0, 12), requests()), min_size=2, max_size=8)
CANCELLATIONS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7)), max_size=2)


@st.composite
def engine_configs(draw):
    max_num_seqs = draw(st.integers(1, 5))
    return {
        "max_num_seqs": max_num_seqs,
        "max_batched_tokens": max_num_seqs + BLOCK_SIZE + draw(st.integers(0, 20)),
        # The longest sequence of a request takes six blocks.
        "num_blocks": draw(st.integers(6, 10)),
        "prefix_cache": draw(st.sampled_from([True, True, True, False])),
    }


def check(kind, config, arrivals, cancellations):
    """Run a schedule; compare every sequence that was not cancelled with itself alone and with the plain model."""
    engine = make_engine(kind, **config)
    found = Crowd(engine).run(arrivals, cancellations)
    cancelled = {request_id for _, request_id in cancellations}
    for request_id, (_, request) in enumerate(arrivals):
        for idx in range(request.n):
            expected = run_alone(kind, request, idx)
            outputs = found.get((request_id, idx), [])
            if request_id in cancelled:
                expected = expected[: len(outputs)]
            assert without_names(outputs) == without_names(expected)
            if outputs:
                assert_logprobs_are_the_models(request, outputs)
    status = engine.status
    assert (status.num_running, status.num_waiting, status.num_free_blocks) == (0, 0, status.num_blocks)
    return status


@settings(max_examples=30, deadline=None)
@given(config=engine_configs(), arrivals=ARRIVALS, cancellations=CANCELLATIONS)
def test_sequences_on_compiled_kernels_say_in_any_schedule_what_they_say_alone(config, arrivals, cancellations):
    check("cpu native", config, arrivals, cancellations)


@settings(max_examples=4, deadline=None)
@given(config=engine_configs(), arrivals=ARRIVALS, cancellations=CANCELLATIONS)
def test_sequences_in_pytorch_say_in_any_schedule_what_they_say_alone(config, arrivals, cancellations):
    check("torch exact", config, arrivals, cancellations)


@pytest.mark.parametrize("kind", KINDS)
def test_they_do_so_when_prompts_are_shared_cut_and_computed_again(kind):
    """The random schedules above need not meet all of it in one run."""
    make = functools.partial(make_request, ignore_eos=True, max_tokens=60)
    arrivals = [
        (idx, make([*BEGINNINGS[0][:40], idx], sampling=SAMPLINGS[idx % 4], routing=ROUTINGS[idx // 3]))
        for idx in range(6)
    ]
    arrivals.append((2, make(BEGINNINGS[0][:40], prompt_logprobs=2, sampling=SAMPLINGS[0])))
    config = {"max_num_seqs": 5, "max_batched_tokens": 24, "num_blocks": 8}
    status = check(kind, config, arrivals, [(20, 4)])
    assert status.num_preemptions > 2 and status.num_prefix_hit_tokens > 64
    assert status.num_computed_tokens > sum(len(request.prompt_ids) for _, request in arrivals)


def draw_request(chance):
    """Return a request as ``requests`` does, from a generator of random numbers that is faster than hypothesis."""
    prompt = [*chance.choice(BEGINNINGS)[: chance.choice([0, 16, 32, 40])], chance.randrange(1, 270)]
    prompt_logprobs = 0 if chance.random() < 0.1 else None
    return make_request(
        prompt,
        max_tokens=chance.choice([1, 4, 10, 50]),
        n=chance.choice([1, 1, 1, 2]),
        routing=chance.choice(ROUTINGS),
        sampling=chance.choice(SAMPLINGS),
        stop=chance.choice([(), ("a",)]),
        prompt_logprobs=prompt_logprobs,
    )


class LongRun:
    """An engine under a stream of random requests, some of which are cancelled."""

    def __init__(self):
        self.chance = random.Random(4)
        self.engine = make_engine("cpu native", max_num_seqs=8, max_batched_tokens=48, num_blocks=14, max_waiting=24)
        self.started_at = {}
        self.num_steps = self.num_added = self.num_cancelled = self.num_refused = self.longest_wait = 0

    def run(self, num_requests):
        """Add requests and step until they have all left."""
        target = self.num_added + num_requests
        while self.num_added < target or self.engine.has_work:
            if self.num_added < target and self.chance.random() < 0.8:
                self._add()
            if self.started_at and self.chance.random() < 0.05:
                self._cancel(self.chance.choice(list(self.started_at)))
            for output in self.engine.step():
                if output.finish_reason is not None:
                    self._end(output)
            self.num_steps += 1

    def _add(self):
        request = draw_request(self.chance)
        try:
            self.engine.add(self.num_added, request)
        except EngineFullError:
            self.num_refused += 1
            return
        self.started_at[self.num_added] = [self.num_steps] * request.n
        self.num_added += 1

    def _cancel(self, request_id):
        assert self.engine.cancel(request_id)
        del self.started_at[request_id]
        self.num_cancelled += 1

    def _end(self, output):
        assert output.error is None
        running = self.started_at[output.request_id]
        self.longest_wait = max(self.longest_wait, self.num_steps - running.pop())
        if not running:
            del self.started_at[output.request_id]


@pytest.mark.slow
def test_2000_random_requests_with_cancellations_all_leave_and_leave_nothing():
    run = LongRun()
    # First whatever is made once: kept descriptions of rules, buffers of libraries.
    run.run(300)
    before = run.engine.status
    gc.collect()
    tracemalloc.start()
    try:
        start_bytes, _ = tracemalloc.get_traced_memory()
        run.run(2000)
        gc.collect()
        end_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert run.started_at == {} and run.num_cancelled > 100 and run.num_refused > 20
    status = run.engine.status
    assert (status.num_running, status.num_waiting, status.num_free_blocks) == (0, 0, status.num_blocks)
    assert status.num_preemptions - before.num_preemptions > 50
    assert status.num_prefix_hit_tokens - before.num_prefix_hit_tokens > 5000
    # At most 32 sequences are before a new one, of at most 41 prompt tokens and 50 more; the earliest gets at least a
    # token a step.
    assert run.longest_wait < 33 * 91
    # What is kept of combinations of rules takes 0.1 MB; 2000 requests that stay would take more than 1 MB.
    assert end_bytes - start_bytes < 400_000
