"""Random numbers that depend on a seed and a place only: the same on every machine and in every release.

There is no state in between: a sequence that is continued by another process, or whose neighbours in a batch change,
draws the same numbers.
"""

import hashlib


def derive_seed(seed: int, sequence_idx: int) -> int:
    """Return the seed of one of a request's sequences; the first has the request's own."""
    if sequence_idx == 0:
        return seed
    return int.from_bytes(_hash(f"{seed}:{sequence_idx}", purpose=b"dsmoe-sequence"), "big") >> 1


def draw_uniform(seed: int, position: int) -> float:
    """Return a number in ``[0, 1)`` that depends on the seed and the position only."""
    # 53 bits, so that the quotient is exact and never rounds up to 1.
    return (int.from_bytes(_hash(f"{seed}:{position}", purpose=b"dsmoe-sampling"), "big") >> 11) / (1 << 53)


def _hash(text: str, *, purpose: bytes) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest()
