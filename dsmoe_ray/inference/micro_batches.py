"""Two halves of a step that take turns, so that the trunk works on one while experts elsewhere work on the other."""

from collections.abc import Generator, Sequence
from typing import TypeVar

import numpy as np

from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.model.config import RoutingMode
from dsmoe_ray.model.layer_routing import LayerRouting

MIN_MICRO_BATCH_TOKENS = 64
"""Each half reads all weights again, which smaller ones would wait for."""

R = TypeVar("R")


def split_batch(batch: ForwardBatch, *, min_tokens: int, mean_over_step: bool) -> list[ForwardBatch]:
    """Cut a step between two sequences into halves that may take turns layer by layer, the first one first.

    A block that is filled in the step belongs to a sequence before those that only read it, so in every layer the keys
    and values of the first half are in the cache before the second one attends.

    Args:
        batch: The step.
        min_tokens: Where no cut leaves each half so many, the whole is returned.
        mean_over_step: Whether ``threshold_top_k`` takes its mean over the step's tokens; then a step with this rule
            stays whole.
    """
    if mean_over_step and any(_takes_a_mean(rules) for rules in batch.rules):
        return [batch]
    starts = batch.query_starts
    cut = int(np.abs(2 * starts[1:-1] - batch.num_tokens).argmin()) + 1 if batch.num_sequences > 1 else 0
    if cut == 0 or min(int(starts[cut]), batch.num_tokens - int(starts[cut])) < min_tokens:
        return [batch]
    row = int(np.searchsorted(batch.logits_rows_R, starts[cut]))
    return [
        _take_sequences(batch, slice(0, cut), batch.logits_rows_R[:row]),
        _take_sequences(batch, slice(cut, batch.num_sequences), batch.logits_rows_R[row:]),
    ]


def _takes_a_mean(rules: Sequence[LayerRouting]) -> bool:
    return any(part.mode is RoutingMode.THRESHOLD_TOP_K for rule in rules for part in rule)


def _take_sequences(batch: ForwardBatch, sequences: slice, logits_rows_R: np.ndarray) -> ForwardBatch:
    first, end = batch.query_starts[sequences.start], batch.query_starts[sequences.stop]
    return ForwardBatch(
        token_ids_T=batch.token_ids_T[first:end],
        query_starts=batch.query_starts[sequences.start : sequences.stop + 1] - first,
        first_positions_B=batch.first_positions_B[sequences],
        block_tables=batch.block_tables[sequences],
        rule_idxs_B=batch.rule_idxs_B[sequences],
        rules=batch.rules,
        logits_rows_R=logits_rows_R - first,
    )


def take_turns(runs: Sequence[Generator[None, None, R]]) -> list[R]:
    """Drive generators to their ends, each a step at a time, the first one always first; return their values."""
    values: dict[int, R] = {}
    while len(values) < len(runs):
        for index, run in enumerate(runs):
            if index in values:
                continue
            try:
                next(run)
            except StopIteration as end:
                values[index] = end.value
    return [values[index] for index in range(len(runs))]
