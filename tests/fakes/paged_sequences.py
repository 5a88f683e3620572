"""Sequences that share a paged KV cache, and the batches that a scheduler would make of them."""

from itertools import zip_longest

import numpy as np
import torch

from dsmoe_ray.inference.batch import ForwardBatch


class PagedSequences:
    """Random token sequences with blocks dealt out in random order; each remembers how far it was computed.

    ``step`` runs chunks of some of them and keeps the logits of every new token in ``logits``.
    """

    def __init__(self, runner, lengths, *, rules, rule_idxs=None, seed=0):
        generator = np.random.default_rng(seed)
        self.runner, self.rules = runner, tuple(tuple(one) for one in rules)
        self.rule_idxs = rule_idxs or [0] * len(lengths)
        self.tokens = [generator.integers(0, runner.config.vocab_size, length) for length in lengths]
        self.computed = [0] * len(lengths)
        self.logits = [[] for _ in lengths]
        free = list(generator.permutation(runner.num_blocks))
        self.tables = [[free.pop() for _ in range(-(-length // runner.block_size))] for length in lengths]

    def share_blocks(self, first, other, *, num_blocks):
        """Let another sequence begin with the blocks of the first, and so with its tokens."""
        num_tokens = num_blocks * self.runner.block_size
        self.tokens[other][:num_tokens] = self.tokens[first][:num_tokens]
        self.tables[other][:num_blocks] = self.tables[first][:num_blocks]
        self.computed[other] = num_tokens

    def batch(self, chunks, *, wanted=None):
        """Return the next ``num_tokens`` of each ``(sequence, num_tokens)`` as a batch."""
        sizes = [size for _, size in chunks]
        tables = np.zeros((len(chunks), max(len(self.tables[index]) for index, _ in chunks)), np.int32)
        for row, (index, _) in enumerate(chunks):
            tables[row, : len(self.tables[index])] = self.tables[index]
        tokens = [self.tokens[index][self.computed[index] : self.computed[index] + size] for index, size in chunks]
        return ForwardBatch(
            token_ids_T=np.concatenate(tokens).astype(np.int32),
            query_starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
            first_positions_B=np.array([self.computed[index] for index, _ in chunks], np.int32),
            block_tables=tables,
            rule_idxs_B=np.array([self.rule_idxs[index] for index, _ in chunks], np.int32),
            rules=self.rules,
            logits_rows_R=np.arange(sum(sizes), dtype=np.int32) if wanted is None else np.array(wanted, np.int32),
        )

    def step(self, *chunks):
        """Run the next ``num_tokens`` of each ``(sequence, num_tokens)``."""
        logits_TV = self.runner.run(self.batch(chunks))
        for (index, size), part in zip(chunks, logits_TV.split([size for _, size in chunks]), strict=True):
            self.logits[index].append(part)
            self.computed[index] += size

    def run(self, chunk_sizes):
        """Run all sequences side by side, each in chunks of the given sizes in turn; return their logits.

        A sequence with a chunk of zero tokens, or no more chunks, sits the step out.
        """
        for sizes in zip_longest(*chunk_sizes, fillvalue=0):
            self.step(*((index, size) for index, size in enumerate(sizes) if size))
        return self.finished()

    def finished(self):
        """Return the logits of every sequence, ``(length, V)`` each; all tokens must have been computed."""
        assert self.computed == [len(tokens) for tokens in self.tokens]
        return [torch.cat(parts) for parts in self.logits]
