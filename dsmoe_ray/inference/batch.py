"""What one step gives to a runner: the tokens of every sequence of the step, and where their keys and values lie.

NumPy only. Shape suffixes: T tokens of the step, B sequences of the step, R rows whose logits are wanted.
"""

from dataclasses import dataclass

import numpy as np

from dsmoe_ray.inference.sequence import ScheduledStep
from dsmoe_ray.model.layer_routing import LayerRouting


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBatch:
    """One chunk of consecutive tokens of each sequence; a decoding sequence has a chunk of one token.

    In every layer the keys and values of all T tokens are in the cache before any token attends: a block of one
    sequence may be in the table of another in the very step that fills it.
    """

    token_ids_T: np.ndarray
    """int32; the chunk of each sequence one after another."""
    query_starts: np.ndarray
    """int32 ``(B + 1,)``: rows ``query_starts[b]`` up to ``query_starts[b + 1]`` belong to sequence b."""
    first_positions_B: np.ndarray
    """int32: position in its sequence of each chunk's first token; earlier positions are in the KV cache."""
    block_tables: np.ndarray
    """int32 ``(B, max blocks)``: KV block ids of each sequence in order; 0 where unused."""
    rule_idxs_B: np.ndarray
    """int32: index into ``rules``."""
    rules: tuple[tuple[LayerRouting, ...], ...]
    """The distinct routing rules of this step, each one entry a layer."""
    logits_rows_R: np.ndarray
    """int32 rows of T whose logits are wanted, ascending."""

    @property
    def num_tokens(self) -> int:
        """Return T."""
        return len(self.token_ids_T)

    @property
    def num_sequences(self) -> int:
        """Return B."""
        return len(self.first_positions_B)


def build_batch(step: ScheduledStep) -> ForwardBatch:
    """Return what a runner needs for a step that has chunks."""
    chunks = step.chunks
    tokens: list[int] = []
    logits_rows: list[int] = []
    starts, positions, rule_idxs = [0], [], []
    rules: dict[bytes, tuple[LayerRouting, ...]] = {}
    idx_of_rules: dict[bytes, int] = {}
    block_tables = np.zeros((len(chunks), max(len(chunk.sequence.block_table) for chunk in chunks)), np.int32)
    for b, (sequence, start, num_tokens, num_logits) in enumerate(chunks):
        if num_tokens == 1:
            tokens.append(sequence.token_ids[start])
        else:
            tokens += sequence.token_ids[start : start + num_tokens]
        end = len(tokens)
        starts.append(end)
        positions.append(start)
        logits_rows += range(end - num_logits, end)
        block_tables[b, : len(sequence.block_table)] = sequence.block_table
        if sequence.rules_key not in idx_of_rules:
            idx_of_rules[sequence.rules_key] = len(rules)
            rules[sequence.rules_key] = sequence.rules
        rule_idxs.append(idx_of_rules[sequence.rules_key])
    return ForwardBatch(
        token_ids_T=np.array(tokens, np.int32),
        query_starts=np.array(starts, np.int32),
        first_positions_B=np.array(positions, np.int32),
        block_tables=block_tables,
        rule_idxs_B=np.array(rule_idxs, np.int32),
        rules=tuple(rules.values()),
        logits_rows_R=np.array(logits_rows, np.int32),
    )
