"""The loop around a scheduler without a model: it checks every step and chooses tokens by rule."""

import itertools

from dsmoe_ray.inference.batch import build_batch
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.scheduler import Scheduler
from dsmoe_ray.inference.sequence import SequenceState, SequenceStatus
from dsmoe_ray.model.config import RoutingConfig
from dsmoe_ray.model.layer_routing import LayerRouting
from tests.fakes.fake_kv_runner import FakeKvRunner

DENSE = (LayerRouting(), LayerRouting())
SPARSE = (LayerRouting(), LayerRouting(ffn=RoutingConfig.parse("top_k=2")))


class ScheduledRun:
    """Sequences in arrival order, a scheduler over them and a runner that checks what the scheduler tells it."""

    def __init__(self, *, num_blocks, **config):
        self.config = EngineConfig(**{"block_size": 4, "max_num_seqs": 4, "max_batched_tokens": 12} | config)
        self.num_blocks = num_blocks
        self.scheduler = Scheduler(self.config, num_blocks=num_blocks)
        self.runner = FakeKvRunner(num_blocks=num_blocks, block_size=self.config.block_size)
        self._ids = itertools.count()
        self.sequences = []
        self.first_admissions = []
        self.logits_seen = {}
        self.stop_at = {}

    def make(self, prompt, *, max_tokens=8, rules=DENSE, stop_after=None, wants_prompt_logits=False):
        """Return a sequence that is not added yet; it ends after ``stop_after`` tokens, at most ``max_tokens``."""
        sequence = SequenceState(
            next(self._ids),
            prompt,
            max_total_tokens=len(prompt) + max_tokens,
            rules=rules,
            wants_prompt_logits=wants_prompt_logits,
        )
        self.stop_at[sequence.sequence_id] = len(prompt) + min(stop_after or max_tokens, max_tokens)
        return sequence

    def add(self, prompt, *, n=1, **options):
        """Add a request of n sequences."""
        sequences = [self.make(prompt, **options) for _ in range(n)]
        self.scheduler.add(*sequences)
        self.sequences += sequences
        self.logits_seen |= {sequence.sequence_id: [] for sequence in sequences}
        return sequences[0] if n == 1 else sequences

    def step(self, *, fails=False, cancel=()):
        """Run one step, cancelling sequences in flight; return the tokens computed of each sequence by its id."""
        step = self.scheduler.schedule()
        self._check(step)
        batch = build_batch(step) if step.chunks else None
        for sequence_id in cancel:
            self.scheduler.cancel(sequence_id)
        if not step.chunks:
            return {}
        if fails:
            try:
                self.runner.run(batch, fails=True)
            except RuntimeError:
                self.scheduler.abort(step)
            return {}
        self.first_admissions += [s for s in step.admitted if s not in self.first_admissions]
        beginnings = iter(self.runner.run(batch))
        self.scheduler.complete(step)
        for chunk in step.chunks:
            self._take(chunk, [next(beginnings) for _ in range(chunk.num_logits)])
        assert next(beginnings, None) is None
        return {chunk.sequence.sequence_id: chunk.num_tokens for chunk in step.chunks}

    def drain(self):
        """Run until nobody is left, which may take one step for every token of every sequence."""
        # Whoever is the earliest computes at least one token a step and is never preempted.
        most = sum(sequence.max_total_tokens for sequence in self.sequences if not sequence.is_finished)
        for _ in range(most + 1):
            if not self.step():
                break
        assert all(sequence.is_finished for sequence in self.sequences)
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        assert self.scheduler.num_free_blocks == self.num_blocks

    def step_until_preempted(self):
        """Run until a sequence lost its blocks for the first time."""
        while not self.scheduler.num_preemptions:
            assert self.step(), "everybody left without a preemption"

    def _take(self, chunk, beginnings):
        sequence = chunk.sequence
        tokens, end = sequence.token_ids, chunk.start + chunk.num_tokens
        for position, beginning in zip(range(end - chunk.num_logits, end), beginnings, strict=True):
            assert beginning == self.runner.beginning_of(sequence.rules, tokens[: position + 1])
            self.logits_seen[sequence.sequence_id].append(position)
        if chunk.samples and not sequence.is_finished:
            if len(tokens) + 1 >= self.stop_at[sequence.sequence_id]:
                self.scheduler.finish(sequence)
                self._check_logits(sequence)
            else:
                self.scheduler.append_token(sequence, self._choose(tokens))

    @staticmethod
    def _choose(tokens):
        # A function of the sequence alone, with few results, so that different sequences meet again.
        return sum(tokens) % 3

    def _check_logits(self, sequence):
        first = 0 if sequence.wants_prompt_logits else sequence.num_prompt_tokens - 1
        assert self.logits_seen[sequence.sequence_id] == list(range(first, len(sequence.token_ids)))

    def _check(self, step):
        running = [s for s in self.sequences if s.status is SequenceStatus.RUNNING]
        scheduled = [chunk.sequence for chunk in step.chunks]
        assert len(running) == self.scheduler.num_running <= self.config.max_num_seqs
        assert step.num_tokens <= self.config.max_batched_tokens
        assert len({id(s) for s in scheduled}) == len(scheduled)
        for sequence, start, num_tokens, _ in step.chunks:
            assert sequence in running and num_tokens >= 1 and start == sequence.num_computed
        self._check_order(running, scheduled)
        self._check_blocks(running)

    def _check_order(self, running, scheduled):
        waiting = [s for s in self.sequences if s.status is SequenceStatus.WAITING]
        if running or waiting:
            # The earliest of all always moves on.
            assert scheduled and self._earliest(running + waiting) in scheduled
        if running and waiting:
            assert max(s.sequence_id for s in running) < min(s.sequence_id for s in waiting)
        for sequence in running:
            if sequence.num_uncomputed == 1 and sequence not in scheduled:
                assert self.scheduler.num_free_blocks == 0, "a decode waits although there is memory"

    def _check_blocks(self, running):
        users = {}
        for sequence in running:
            assert len(set(sequence.block_table)) == len(sequence.block_table)
            for idx, block in enumerate(sequence.block_table):
                users.setdefault(block, []).append((idx, sequence))
        assert len(users) + self.scheduler.num_free_blocks == self.num_blocks
        for (idx, first), *others in users.values():
            size = self.config.block_size
            for other_idx, other in others:
                assert other_idx == idx and other.rules == first.rules
                assert other.token_ids[: (idx + 1) * size] == first.token_ids[: (idx + 1) * size]
                assert len(other.token_ids) >= (idx + 1) * size
        for sequence in self.sequences:
            assert sequence in running or not sequence.block_table

    @staticmethod
    def _earliest(sequences):
        return min(sequences, key=lambda s: s.sequence_id)
