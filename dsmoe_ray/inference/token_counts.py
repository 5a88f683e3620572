"""What a sequence has said so far, as penalties need it: kept up to date token by token, never counted again.

Shape suffixes: V vocabulary, N distinct tokens of the sequence.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from dsmoe_ray.inference.sampling_config import SamplingConfig


class TokenCounts:
    """The distinct tokens of one sequence and how often each was generated; 0 means that only the prompt has it."""

    def __init__(self, prompt_ids: Iterable[int], generated_ids: Iterable[int] = ()) -> None:
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(prompt_ids))}
        # Grows by doubling, so that a push costs the same however long the sequence is.
        capacity = max(64, 2 * len(self._slots))
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._ids[: len(self._slots)] = list(self._slots)
        self._counts = np.zeros(capacity, dtype=np.float64)
        for token_id in generated_ids:
            self.push(token_id)

    def push(self, token_id: int) -> None:
        """Count a token that was generated."""
        slot = self._slots.get(token_id)
        if slot is None:
            slot = self._slots[token_id] = len(self._slots)
            if slot == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[slot] = token_id
        self._counts[slot] += 1

    def penalize(self, logits_V: NDArray[np.float64], sampling: SamplingConfig) -> None:
        """Apply the penalties of ``sampling`` in place: repetition first, then frequency and presence."""
        num_distinct = len(self._slots)
        ids_N, counts_N = self._ids[:num_distinct], self._counts[:num_distinct]
        logits_N = logits_V[ids_N]
        if sampling.repetition_penalty != 1:
            penalty = sampling.repetition_penalty
            logits_N = np.where(logits_N > 0, logits_N / penalty, logits_N * penalty)
        logits_N = logits_N - sampling.frequency_penalty * counts_N - sampling.presence_penalty * (counts_N > 0)
        logits_V[ids_N] = logits_N
