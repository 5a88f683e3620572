"""What one step gives to a runner: the tokens of every sequence of the step, and where their keys and values lie.

Pure data, NumPy only. Shape suffixes: T tokens of the step, B sequences of the step, R rows whose logits are wanted.
"""

from dataclasses import dataclass

import numpy as np

from dsmoe_ray.model.transformer import LayerRouting


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
