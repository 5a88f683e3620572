"""Share out a number of experts among layers at the least loss. Pure arithmetic.

The loss of a table is taken as the sum of what each layer's cut costs alone; under that assumption the share-out is
exact (dynamic programming over layers). Shape suffixes: L layers, E experts, K numbers of kept experts, B budgets.
"""

from collections.abc import Sequence

import numpy as np


def fill_profile(top_k_K: Sequence[int], loss_increase_LK: np.ndarray, *, num_experts: int) -> np.ndarray:
    """Return the loss increase of each layer for every k from 1 to ``num_experts``, ``(L, E)``.

    Between measured numbers it is interpolated; all experts cost nothing. A larger k never costs more than a smaller
    one: where a measurement says so, it is noise, or experts that do harm, and the smaller k is there to be taken.

    Args:
        top_k_K: Measured numbers of kept experts, ascending, from 1 on, below ``num_experts``.
        loss_increase_LK: Over the loss with all experts.
        num_experts: Of a layer.
    """
    known_K = [*top_k_K, num_experts]
    filled_LE = [np.interp(range(1, num_experts + 1), known_K, [*row, 0.0]) for row in loss_increase_LK]
    return np.minimum.accumulate(np.array(filled_LE), axis=1)


def allocate(loss_increase_LE: np.ndarray, num_kept: int) -> tuple[int, ...]:
    """Return how many experts each layer keeps, at least one, ``num_kept`` at most in all, at the least summed loss.

    Args:
        loss_increase_LE: What layer l costs with ``e + 1`` experts.
        num_kept: At least the number of layers.

    Raises:
        ValueError: there is not one expert for each layer.
    """
    num_layers, num_experts = loss_increase_LE.shape
    if num_kept < num_layers:
        raise ValueError(f"{num_layers} layers need at least one expert each; got {num_kept} in all")
    num_kept = min(num_kept, num_layers * num_experts)
    # least_B[b]: the least loss of the layers so far with b experts at most; no layer so far costs nothing.
    least_B = np.zeros(num_kept + 1)
    choices = []
    for increase_E in loss_increase_LE:
        with_k_EB = np.full((num_experts, num_kept + 1), np.inf)
        for index, increase in enumerate(increase_E[:num_kept]):
            with_k_EB[index, index + 1 :] = least_B[: num_kept - index] + increase
        # Among equals the first: no expert is spent that brings nothing.
        choices.append(with_k_EB.argmin(0))
        least_B = with_k_EB.min(0)
    table = []
    for choice_B in reversed(choices):
        table.append(int(choice_B[num_kept]) + 1)
        num_kept -= table[-1]
    return tuple(reversed(table))


def spread_evenly(num_kept: int, num_layers: int) -> int:
    """Return the k of a uniform top-k that keeps ``num_kept`` experts at most in all layers together."""
    return num_kept // num_layers
