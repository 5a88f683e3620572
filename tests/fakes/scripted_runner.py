"""A runner without a model: what it says after a beginning of a sequence is a function of the test's."""

import torch

from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.model.config import ModelConfig


class ScriptedRunner:
    """A ``ModelRunner`` whose KV cache holds tokens, so that each row's sequence is read back through its blocks.

    ``next_logits`` gives the logits after a list of tokens.
    """

    def __init__(self, config: ModelConfig, next_logits, *, block_size, num_blocks):
        self.config, self.block_size, self.num_blocks = config, block_size, num_blocks
        self.kv_cache_bytes = 1000 * num_blocks
        self.next_logits = next_logits
        self.batches = []
        """Of every step that was computed, the number of tokens of each sequence."""
        self._tokens = {}
        self._error = None

    def fail_once(self, error):
        """Raise in the next step, which leaves nonsense in all that it writes to."""
        self._error = error

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        ends = [self._write(batch, b) for b in range(batch.num_sequences)]
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self.batches.append([int(size) for size in batch.query_starts[1:] - batch.query_starts[:-1]])
        beginning_of = [(b, end) for b, of_sequence in enumerate(ends) for end in of_sequence]
        rows = [self.next_logits(self._read(batch, *beginning_of[row])) for row in batch.logits_rows_R]
        return torch.stack(rows) if rows else torch.empty(0, self.config.vocab_size)

    def _write(self, batch, b):
        first = int(batch.first_positions_B[b])
        tokens = batch.token_ids_T[batch.query_starts[b] : batch.query_starts[b + 1]].tolist()
        for position, token in enumerate(tokens, start=first):
            self._tokens[self._slot(batch, b, position)] = token if self._error is None else "nonsense"
        return range(first + 1, first + len(tokens) + 1)

    def _read(self, batch, b, end):
        return [self._tokens[self._slot(batch, b, position)] for position in range(end)]

    def _slot(self, batch, b, position):
        return int(batch.block_tables[b, position // self.block_size]) * self.block_size + position % self.block_size


def say(vocab_size, tokens_after):
    """Return logits that are 1 for the token of a script and 0 for all others; all 0 where no script goes on.

    ``tokens_after`` maps prompts, tuples of tokens, to what is said after them.
    """

    def next_logits(tokens):
        logits_V = torch.zeros(vocab_size)
        for prompt, said in tokens_after.items():
            whole, length = (*prompt, *said), len(tokens)
            if len(prompt) <= length < len(whole) and whole[:length] == tuple(tokens):
                logits_V[whole[length]] = 1.0
        return logits_V

    return next_logits
