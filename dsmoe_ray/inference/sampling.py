"""From the logits of a step's sequences to their next tokens.

What acts on a row of logits, in this order:

1. ``logit_bias`` is added;
2. the penalties: repetition (over prompt and output), then frequency and presence (over the output only);
3. temperature 0 takes the token of the largest logit and ends here; otherwise the logits are divided by it;
4. ``top_k`` keeps the most likely tokens;
5. ``top_p`` keeps the fewest most likely of those whose share of their probabilities reaches it;
6. ``min_p`` keeps those of them that are likely enough beside the most likely one;
7. a token is drawn from what is kept, in proportion.

The order is that of Hugging Face's transformers. Of equally likely tokens the lower id comes first, also where a
truncation cuts between them. Log probabilities are of the model's own distribution: a softmax over the whole vocabulary
of the logits as the model gave them, before 1.

A row's result depends on no other row, and the random number only on the sequence's seed and the position.

Shape suffixes: R rows, V vocabulary, K tokens kept.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dsmoe_ray.errors import DsmoeError
from dsmoe_ray.inference.sampling_config import SampledToken, SamplingConfig
from dsmoe_ray.inference.seeds import draw_uniform
from dsmoe_ray.inference.token_counts import TokenCounts

FloatArray = NDArray[np.floating]


class RowSampling(NamedTuple):
    """How the token of one row of logits is chosen."""

    sampling: SamplingConfig
    seed: int
    """The sequence's, see ``derive_seed``; ``sampling.seed`` is not read."""
    position: int
    """Of the token to choose, counted from the start of the prompt."""
    token_counts: TokenCounts | None = None
    """Tokens so far; needed with penalties only."""


def sample_batch(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> list[SampledToken | DsmoeError]:
    """Choose one token per row.

    Args:
        logits_RV: Float32 on the CPU ``(R, V)``; minus infinity forbids a token.
        rows: One per row of logits.

    Returns:
        Per row its token, or an error, not raised, when the row's logits are not finite, so that the model is broken,
        or are not after what was asked of them.
    """
    logits = logits_RV.numpy()
    best_R = logits.argmax(axis=1)
    largest_R = logits[np.arange(len(rows)), best_R].tolist()
    sampled: list[SampledToken | DsmoeError] = []
    for index, (row, best, largest) in enumerate(zip(rows, best_R.tolist(), largest_R, strict=True)):
        # The largest of a row with a NaN is NaN.
        if not math.isfinite(largest):
            sampled.append(_not_finite(row.position))
        elif row.sampling.is_plain_greedy:
            sampled.append(SampledToken(best))
        else:
            sampled.append(_sample_row(logits[index], row, best=best))
    return sampled


def compute_logprobs(
    logits_RV: torch.Tensor, target_ids_R: Sequence[int], *, num_top: int, first_position: int
) -> list[SampledToken]:
    """Return log probabilities of given tokens, as of a prompt's, and of the most likely ones at their positions.

    Args:
        logits_RV: Float32 on the CPU ``(R, V)``.
        target_ids_R: The token of each row: of a prompt, the one after that whose row it is.
        num_top: Most likely tokens to tell, 0 for none.
        first_position: Position of the first target, for errors.

    Raises:
        DsmoeError: a row's logits are not finite.
    """
    logits = logits_RV.numpy()
    largest_R = logits.max(axis=1)
    for index in np.flatnonzero(~np.isfinite(largest_R)):
        raise _not_finite(first_position + int(index))
    return [_score(row_V, int(target), num_top=num_top) for row_V, target in zip(logits, target_ids_R, strict=True)]


def _not_finite(position: int) -> DsmoeError:
    return DsmoeError(f"the model's logits at position {position} are not finite; its weights cannot be used")


def _sample_row(logits_V: FloatArray, row: RowSampling, *, best: int) -> SampledToken | DsmoeError:
    sampling, changed_V = row.sampling, logits_V
    if sampling.changes_logits:
        changed_V = _change_logits(logits_V, row)
        # Nothing can be drawn in proportion to what is infinite or no number.
        if not math.isfinite(changed_V.max()):
            return DsmoeError(
                f"the logits at position {row.position} are not finite after logit_bias and penalties. Set them nearer "
                "to none."
            )
    if sampling.temperature > 0:
        token_id = _draw_token(changed_V, sampling, draw_uniform(row.seed, row.position))
    else:
        token_id = int(changed_V.argmax()) if sampling.changes_logits else best
    if sampling.logprobs is None:
        return SampledToken(token_id)
    return _score(logits_V, token_id, num_top=sampling.logprobs)


def _change_logits(logits_V: FloatArray, row: RowSampling) -> NDArray[np.float64]:
    sampling = row.sampling
    changed_V = logits_V.astype(np.float64)
    if sampling.logit_bias:
        ids = np.fromiter(sampling.logit_bias.keys(), dtype=np.int64)
        changed_V[ids] += np.fromiter(sampling.logit_bias.values(), dtype=np.float64)
    if sampling.has_penalties:
        if row.token_counts is None:
            raise ValueError("a sequence with penalties needs its token_counts")
        row.token_counts.penalize(changed_V, sampling)
    return changed_V


def _draw_token(logits_V: FloatArray, sampling: SamplingConfig, uniform: float) -> int:
    ids_K = None
    if sampling.top_k is not None and sampling.top_k < len(logits_V):
        # First, so that what follows is as cheap as top_k is small.
        ids_K = _find_largest(logits_V, sampling.top_k)
    logits_K = logits_V if ids_K is None else logits_V[ids_K]
    weights_K = _to_weights(logits_K, sampling.temperature)
    if sampling.top_p < 1:
        kept = _find_nucleus(weights_K, sampling.top_p)
        ids_K, weights_K = _choose(ids_K, kept), weights_K[kept]
    if sampling.min_p > 0:
        # The most likely token's weight is 1.
        kept = np.flatnonzero(weights_K >= sampling.min_p)
        ids_K, weights_K = _choose(ids_K, kept), weights_K[kept]
    drawn = _draw(weights_K, uniform)
    return drawn if ids_K is None else int(ids_K[drawn])


def _choose(ids_K: NDArray[np.int64] | None, kept: NDArray[np.int64]) -> NDArray[np.int64]:
    return kept if ids_K is None else ids_K[kept]


def _to_weights(logits_K: FloatArray, temperature: float) -> NDArray[np.float64]:
    """Return probabilities times a constant that makes the largest 1."""
    weights_K = logits_K.astype(np.float64)
    weights_K -= weights_K.max()
    if temperature != 1:
        # At a temperature near zero all but the largest become minus infinity, as they should.
        with np.errstate(over="ignore"):
            weights_K /= temperature
    return np.exp(weights_K, out=weights_K)


def _find_largest(values_V: FloatArray, num_kept: int) -> NDArray[np.int64]:
    """Return the indices of the largest values, ascending; of equal ones at the border the lower indices."""
    if num_kept == 1:
        return np.array([values_V.argmax()])
    border = np.partition(values_V, len(values_V) - num_kept)[len(values_V) - num_kept]
    return _keep_from(values_V, border, num_kept)


def _find_nucleus(weights_K: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Return the indices of the fewest largest weights that reach the share ``top_p`` of their sum, ascending."""
    total = weights_K.sum()
    # Weights below the mean of what may be left out do not reach that share even together, so none of them is needed:
    # of most rows only a few are left to sort.
    candidates = weights_K[weights_K >= (1 - top_p) * total / len(weights_K)]
    candidates = np.sort(candidates)[::-1]
    num_kept = int(np.searchsorted(candidates.cumsum(), top_p * total)) + 1
    num_kept = min(num_kept, len(candidates))
    return _keep_from(weights_K, candidates[num_kept - 1], num_kept)


def _keep_from(values_V: FloatArray, border: float, num_kept: int) -> NDArray[np.int64]:
    kept = np.flatnonzero(values_V >= border)
    num_surplus = len(kept) - num_kept
    if num_surplus > 0:
        at_border = np.flatnonzero(values_V[kept] == border)
        kept = np.delete(kept, at_border[-num_surplus:])
    return kept


def _draw(weights_K: NDArray[np.float64], uniform: float) -> int:
    """Return index i with a probability proportional to ``weights_K[i]``."""
    cumulative = weights_K.cumsum()
    total = float(cumulative[-1])
    # Rounding must not carry the product up to the total, which no index lies above.
    target = min(uniform * total, math.nextafter(total, 0.0))
    return int(cumulative.searchsorted(target, side="right"))


def _score(logits_V: FloatArray, token_id: int, *, num_top: int) -> SampledToken:
    shifted_V = logits_V.astype(np.float64)
    shifted_V -= shifted_V.max()
    log_sum = math.log(np.exp(shifted_V).sum())
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        ids = _find_largest(logits_V, min(num_top, len(logits_V)))
        ids = ids[np.argsort(-logits_V[ids], kind="stable")]
        top = tuple(zip(ids.tolist(), (shifted_V[ids] - log_sum).tolist(), strict=True))
    return SampledToken(token_id, float(shifted_V[token_id]) - log_sum, top)
