"""Which tokens of which sequences the next step computes: continuous batching with chunked prefill.

Start at ``Scheduler.schedule``. Sequences run in order of arrival and everything is given in that order:

- Every decoding sequence gets its one token a step; prompts share what is left of the step's tokens, the earliest
  first. The limits of ``EngineConfig`` leave a prompt at least a block a step, however many decode.
- A waiting sequence is admitted when all its tokens and the near future of those that run fit into the KV cache.
- When a sequence needs a block and none is free, the latest arrived gives all of its own back and waits again, to be
  computed anew from its prompt and the tokens generated so far. So the earliest always moves on, and everyone becomes
  the earliest in time.

A full block can be found by other sequences from the moment it is scheduled, as a runner stores the keys and values of
a whole step before any token attends. ``abort`` takes that back for a step that failed.

Knows neither models nor sampling. Not for more than one thread.
"""

from array import array
from collections import deque
from collections.abc import Hashable

from dsmoe_ray.errors import EngineFullError, RequestError
from dsmoe_ray.inference.block_pool import BlockPool
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.sequence import Chunk, ScheduledStep, SequenceState, SequenceStatus


class Scheduler:
    """Waiting and running sequences and the blocks they hold.

    A step goes ``schedule``, the runner and sampling, ``complete`` (or ``abort`` if they raised), then ``append_token``
    or ``finish`` for every sequence that samples.
    """

    def __init__(self, config: EngineConfig, *, num_blocks: int) -> None:
        self._config = config
        self._block_size = config.block_size
        self._pool = BlockPool(num_blocks=num_blocks)
        # Both in order of arrival, and all that run arrived before all that wait.
        self._running: list[SequenceState] = []
        self._waiting: deque[SequenceState] = deque()
        self._sequences: dict[Hashable, SequenceState] = {}
        self._step_in_flight: ScheduledStep | None = None
        self.num_preemptions = 0
        self.num_prefix_hit_tokens = 0
        """Tokens that were not computed because their blocks were found."""

    @property
    def num_running(self) -> int:
        """Return how many sequences run."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Return how many sequences wait, preempted ones included."""
        return len(self._waiting)

    @property
    def num_free_blocks(self) -> int:
        """Return how many blocks no sequence uses."""
        return self._pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Return how many blocks the prefix cache can find."""
        return self._pool.num_cached

    def add(self, *sequences: SequenceState) -> None:
        """Put the sequences of one request at the end of the queue, all or none.

        Raises:
            RequestError: they could never run with this configuration.
            EngineFullError: there is no room in the queue now.
        """
        for sequence in sequences:
            self._check_fits(sequence)
        self.check_queue(len(sequences))
        for sequence in sequences:
            assert sequence.sequence_id not in self._sequences, f"{sequence.sequence_id} is already here"
            self._sequences[sequence.sequence_id] = sequence
            self._waiting.append(sequence)

    def check_queue(self, num_sequences: int) -> None:
        """Raise as ``add`` does unless the queue has room for a request of so many sequences."""
        allowed = self._config.max_waiting
        if num_sequences > allowed:
            raise RequestError(
                f"a request for {num_sequences} samples was found; at most {allowed} can wait. Lower n, or raise "
                "max_waiting of the engine.",
                param="n",
            )
        if len(self._waiting) + num_sequences > allowed:
            raise EngineFullError(
                f"the engine is full: {len(self._waiting)} sequences wait, {num_sequences} came and {allowed} are "
                "allowed. Try again later, or raise max_waiting of the engine."
            )

    def cancel(self, sequence_id: Hashable) -> bool:
        """Make a sequence leave; return False if it is not here (any more).

        It is in no later step and its blocks are free at once; a step in flight may still compute it.
        """
        sequence = self._sequences.get(sequence_id)
        if sequence is None:
            return False
        self.finish(sequence)
        return True

    def schedule(self) -> ScheduledStep:
        """Return the next step; it has no chunks when nothing waits or runs."""
        assert self._step_in_flight is None, "the last step was neither completed nor aborted"
        step = ScheduledStep()
        budget = self._schedule_running(step)
        if self._waiting:
            self._admit(step, budget)
        if step.chunks:
            self._step_in_flight = step
        return step

    def complete(self, step: ScheduledStep) -> None:
        """Note that a step was computed."""
        self._end(step)
        for sequence, start, num_tokens, _ in step.chunks:
            sequence.num_computed = start + num_tokens
            sequence.num_logits_done = max(sequence.num_logits_done, sequence.num_computed)

    def abort(self, step: ScheduledStep) -> None:
        """Note that a step failed: nothing of it counts, and its sequences will be scheduled again."""
        self._end(step)
        for block in step.registered_blocks:
            self._pool.forget(block)
        # They may have begun with blocks that this step should have filled. They are the last that run.
        for sequence in reversed(step.admitted):
            if not sequence.is_finished:
                self.num_prefix_hit_tokens -= sequence.num_computed
                self._make_wait(sequence)

    def append_token(self, sequence: SequenceState, token: int) -> None:
        """Add the token that was chosen for a sequence, to be computed in the next step."""
        assert sequence.status is SequenceStatus.RUNNING and sequence.num_uncomputed == 0
        assert len(sequence.token_ids) + 1 < sequence.max_total_tokens, "the last token is not computed: finish"
        sequence.token_ids.append(token)

    def finish(self, sequence: SequenceState) -> None:
        """Let a sequence go and free its blocks; what is full of them stays findable."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        self._release_blocks(sequence)
        del self._sequences[sequence.sequence_id]

    def _schedule_running(self, step: ScheduledStep) -> int:
        """Give those that run their tokens; return how many tokens are left for others."""
        running = self._running
        num_decodes = sum(len(sequence.token_ids) - sequence.num_computed == 1 for sequence in running)
        budget = self._config.max_batched_tokens - num_decodes
        prefills: list[tuple[SequenceState, int]] = []
        # Whoever is preempted on the way is at the end of the list and has not had its turn.
        idx = 0
        while idx < len(running):
            sequence = running[idx]
            idx += 1
            num_uncomputed = len(sequence.token_ids) - sequence.num_computed
            if num_uncomputed == 1:
                if self._make_room(sequence, 1):
                    self._add_chunk(step, sequence, 1)
            elif num_tokens := self._make_room(sequence, min(num_uncomputed, budget)):
                budget -= num_tokens
                prefills.append((sequence, num_tokens))
        for sequence, num_tokens in prefills:
            self._add_chunk(step, sequence, num_tokens)
        return budget

    def _make_room(self, sequence: SequenceState, num_tokens: int) -> int:
        """Give a running sequence blocks for its next tokens; return for how many of them there is room."""
        pool, block_table = self._pool, sequence.block_table
        room = len(block_table) * self._block_size - sequence.num_computed
        if room >= num_tokens:
            return num_tokens
        while room == 0 and pool.num_free == 0 and self._running[-1] is not sequence:
            self._preempt(self._running[-1])
        num_missing = self._blocks_for(num_tokens - room)
        for _ in range(min(num_missing, pool.num_free)):
            block_table.append(pool.allocate())
        return min(num_tokens, len(block_table) * self._block_size - sequence.num_computed)

    def _admit(self, step: ScheduledStep, budget: int) -> None:
        """Let those that wait longest run while there is room for them."""
        if len(self._running) == self._config.max_num_seqs or budget == 0:
            return
        num_promised = sum(self._num_blocks_to_come(sequence) for sequence in self._running)
        while self._waiting and len(self._running) < self._config.max_num_seqs and budget > 0:
            sequence = self._waiting[0]
            found = self._find_prefix(sequence)
            num_needed = self._blocks_for(len(sequence.token_ids)) - len(found) + self._pool.count_unused(found)
            if num_needed + num_promised > self._pool.num_free:
                return
            self._waiting.popleft()
            self._start(sequence, found)
            step.admitted.append(sequence)
            num_tokens = self._make_room(sequence, min(sequence.num_uncomputed, budget))
            self._add_chunk(step, sequence, num_tokens)
            budget -= num_tokens
            num_promised += self._num_blocks_to_come(sequence)

    def _find_prefix(self, sequence: SequenceState) -> list[int]:
        """Return the blocks that hold the beginning of a sequence, short of the tokens whose logits are wanted."""
        if not self._config.prefix_cache:
            return []
        num_tokens = len(sequence.token_ids) - 1
        if sequence.wants_prompt_logits:
            num_tokens = min(num_tokens, sequence.num_logits_done)
        return self._pool.find(sequence.block_keys(num_tokens // self._block_size, block_size=self._block_size))

    def _start(self, sequence: SequenceState, found: list[int]) -> None:
        self._pool.share(found)
        sequence.block_table.extend(found)
        sequence.num_computed = len(found) * self._block_size
        sequence.status = SequenceStatus.RUNNING
        if sequence.num_preemptions == 0:
            sequence.num_prefix_hit_tokens = sequence.num_computed
        self.num_prefix_hit_tokens += sequence.num_computed
        self._running.append(sequence)

    def _add_chunk(self, step: ScheduledStep, sequence: SequenceState, num_tokens: int) -> None:
        start = sequence.num_computed
        end = start + num_tokens
        if sequence.wants_prompt_logits:
            num_logits = max(end - max(start, sequence.num_logits_done), 0)
        else:
            num_logits = int(end == len(sequence.token_ids))
        step.chunks.append(Chunk(sequence, start, num_tokens, num_logits))
        num_full = end // self._block_size
        if self._config.prefix_cache and num_full > start // self._block_size:
            keys = sequence.block_keys(num_full, block_size=self._block_size)
            for idx in range(start // self._block_size, num_full):
                block = sequence.block_table[idx]
                if self._pool.register(block, keys[idx]):
                    step.registered_blocks.append(block)

    def _preempt(self, sequence: SequenceState) -> None:
        self.num_preemptions += 1
        sequence.num_preemptions += 1
        self._make_wait(sequence)

    def _make_wait(self, sequence: SequenceState) -> None:
        """Put the latest that runs back to the front of the queue, without its blocks."""
        latest = self._running.pop()
        assert latest is sequence
        self._release_blocks(sequence)
        sequence.num_computed = 0
        sequence.status = SequenceStatus.WAITING
        self._waiting.appendleft(sequence)

    def _release_blocks(self, sequence: SequenceState) -> None:
        self._pool.release(sequence.block_table)
        sequence.block_table = array("i")

    def _end(self, step: ScheduledStep) -> None:
        assert self._step_in_flight is step or not step.chunks
        self._step_in_flight = None

    def _num_blocks_to_come(self, sequence: SequenceState) -> int:
        """Return how many blocks a running sequence wants soon: for all its tokens and one block more."""
        soon = min(len(sequence.token_ids) + self._block_size, sequence.max_positions)
        return self._blocks_for(soon) - len(sequence.block_table)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _check_fits(self, sequence: SequenceState) -> None:
        most = self._pool.num_blocks * self._block_size
        if sequence.max_positions > most:
            raise RequestError(
                f"a prompt of {sequence.num_prompt_tokens} tokens with {sequence.max_total_tokens} tokens in all needs "
                f"keys and values of {sequence.max_positions} positions; the KV cache holds {most}, in "
                f"{self._pool.num_blocks} blocks of {self._block_size}. Lower max_tokens, shorten the prompt, or raise "
                "kv_cache_bytes of the engine.",
                param="max_tokens",
            )
