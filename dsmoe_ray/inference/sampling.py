"""From the logits of one position to the next token.

Randomness is a hash of (seed, position), with no state in between: a sequence that is continued by another process, or
whose neighbours in a batch change, draws the same numbers.

Shape suffixes: V vocabulary, K tokens kept.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from dsmoe_ray.errors import DsmoeError, UserError


@dataclass(frozen=True)
class SamplingConfig:
    """How one sequence chooses its tokens; checked when made."""

    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own probabilities."""
    top_k: int | None = None
    """Sample from this many most likely tokens only."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens whose probabilities reach this sum."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature must be a finite number of at least 0; found {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1; found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1; found {self.top_p}")


GREEDY = SamplingConfig()


def sample(logits_V: torch.Tensor, sampling: SamplingConfig, *, position: int) -> int:
    """Choose the token at ``position``, counted from the start of the prompt. Ties go to the lower id.

    Raises:
        DsmoeError: the logits are not finite, so the model is broken.
    """
    logits_V = logits_V.to("cpu", torch.float64)
    largest, most_likely = logits_V.max(dim=0)
    if not math.isfinite(largest.item()):
        raise DsmoeError(f"the model's logits at position {position} are not finite; its weights cannot be used")
    if sampling.temperature == 0:
        return int(most_likely)
    weights_V = ((logits_V - largest) / sampling.temperature).exp_()
    if sampling.top_k is None and sampling.top_p == 1:
        return _draw(weights_V, draw_uniform(sampling.seed, position))
    weights_K, ids_K = _keep_most_likely(weights_V, sampling)
    return int(ids_K[_draw(weights_K, draw_uniform(sampling.seed, position))])


def draw_uniform(seed: int, position: int) -> float:
    """Return a number in ``[0, 1)`` that depends on the seed and the position only."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8, person=b"dsmoe-sampling").digest()
    # 53 bits, so that the quotient is exact and never rounds up to 1.
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def _keep_most_likely(weights_V: torch.Tensor, sampling: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    sorted_V, ids_V = weights_V.sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    num_kept = max(int((before_V < sampling.top_p * sorted_V.sum()).sum()), 1)
    num_kept = min(num_kept, sampling.top_k or num_kept)
    return sorted_V[:num_kept], ids_V[:num_kept]


def _draw(weights: torch.Tensor, uniform: float) -> int:
    """Return index i with a probability proportional to ``weights[i]``."""
    cumulative = weights.cumsum(0)
    total = cumulative[-1].item()
    # Rounding must not carry the product up to the total, which no index lies above.
    target = min(uniform * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(cumulative, target, right=True))
