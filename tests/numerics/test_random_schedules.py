"""Whatever the schedule, every token attends to exactly its own sequence, and nothing is lost, leaked or starved.

``ScheduledRun`` and its runner check every step: who owns which block, what every block holds, the budget, the order,
and the logits each sequence got.
"""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from dsmoe_ray.errors import EngineFullError, RequestError
from tests.fakes.scheduled_run import DENSE, SPARSE, ScheduledRun

# Of few tokens and few lengths, so that many begin alike, at and beside the edges of blocks.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class RandomSchedules(RuleBasedStateMachine):
    """Adds, cancels, ends, failures and steps in any order, in a memory of 2 to 8 blocks."""

    @initialize(
        num_blocks=st.integers(2, 8),
        block_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 4),
        spare_tokens=st.integers(0, 5),
        prefix_cache=st.sampled_from([True, True, False]),
    )
    def start(self, num_blocks, block_size, max_num_seqs, spare_tokens, prefix_cache):
        self.run = ScheduledRun(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_num_seqs + block_size + spare_tokens,
            max_waiting=6,
            prefix_cache=prefix_cache,
        )

    @rule(
        prompt=PROMPTS,
        n=st.integers(1, 3),
        max_tokens=st.integers(0, 12),
        stop_after=st.integers(1, 12),
        rules=st.sampled_from([DENSE, DENSE, SPARSE]),
        echo=st.booleans(),
    )
    def add(self, prompt, n, max_tokens, stop_after, rules, echo):
        options = {"max_tokens": max_tokens, "stop_after": stop_after, "rules": rules, "wants_prompt_logits": echo}
        num_waiting = self.run.scheduler.num_waiting
        try:
            self.run.add(prompt, n=n, **options)
        except EngineFullError:
            assert num_waiting + n > 6
        except RequestError:
            assert len(prompt) + max(max_tokens - 1, 0) > self.run.num_blocks * self.run.config.block_size

    @rule(data=st.data())
    def cancel(self, data):
        self.run.scheduler.cancel(self._choose(data))

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps):
        for _ in range(num_steps):
            self.run.step()

    @rule(data=st.data(), fails=st.booleans())
    def step_with_a_cancellation_in_flight(self, data, fails):
        self.run.step(fails=fails, cancel=[self._choose(data)])

    @rule()
    def step_that_fails(self):
        self.run.step(fails=True)

    def teardown(self):
        if hasattr(self, "run"):
            self.run.drain()
            admitted = [sequence.sequence_id for sequence in self.run.first_admissions]
            assert admitted == sorted(admitted)

    def _choose(self, data):
        here = [sequence.sequence_id for sequence in self.run.sequences if not sequence.is_finished]
        return data.draw(st.sampled_from(here)) if here else None


TestRandomSchedules = RandomSchedules.TestCase
TestRandomSchedules.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["with prefix cache", "without prefix cache"])
def test_2000_random_requests_with_random_cancellations_all_leave_and_leave_nothing(prefix_cache):
    chance = random.Random(1 + prefix_cache)
    run = ScheduledRun(num_blocks=16, max_num_seqs=8, max_batched_tokens=24, max_waiting=20, prefix_cache=prefix_cache)
    beginnings = [[chance.randrange(3) for _ in range(8)] for _ in range(4)]
    num_cancelled = num_refused = 0
    ended = []
    while len(ended) + len(run.sequences) < 2000:
        ended += [sequence for sequence in run.sequences if sequence.is_finished]
        run.sequences = [sequence for sequence in run.sequences if not sequence.is_finished]
        if chance.random() < 0.7:
            prompt = chance.choice(beginnings) + [chance.randrange(3) for _ in range(chance.randrange(1, 12))]
            options = {"max_tokens": chance.randrange(1, 24), "wants_prompt_logits": chance.random() < 0.1}
            try:
                run.add(prompt, rules=chance.choice([DENSE, SPARSE]), stop_after=chance.randrange(1, 24), **options)
            except EngineFullError:
                num_refused += 1
        if run.sequences and chance.random() < 0.1:
            num_cancelled += run.scheduler.cancel(chance.choice(run.sequences).sequence_id)
        run.step(fails=chance.random() < 0.01)
    run.drain()
    assert num_cancelled > 200 and num_refused > 20
    assert run.scheduler.num_preemptions > 100
    assert (run.scheduler.num_prefix_hit_tokens > 4000) == prefix_cache
