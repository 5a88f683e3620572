"""How much may be under way at once: a budget of tokens and of sequences, and when to come again if it is used up.

What is taken on starts at once or nearly so; what would only wait is refused right away, which keeps the time to the
first token of everyone else.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.serving.openai_api.errors import ApiError, refuse_overload

_HALF_LIFE_S = 5.0
_MAX_RETRY_S = 30


class _Budget:
    """One kind of thing that calls take and give back."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.taken = 0
        self._given_back = 0.0
        self._seen_s = 0.0

    def give_back(self, amount: int, now_s: float) -> None:
        self.taken -= amount
        self._given_back = self._decayed(now_s) + amount
        self._seen_s = now_s

    def estimate_wait_s(self, amount: int, now_s: float) -> float:
        """Return when so much is likely to be free, by how fast it was given back lately."""
        missing = self.taken + amount - self.capacity
        per_s = self._decayed(now_s) * math.log(2) / _HALF_LIFE_S
        if missing <= 0:
            return 0.0
        return missing / per_s if per_s > 0 else 1.0

    def _decayed(self, now_s: float) -> float:
        return self._given_back * 0.5 ** ((now_s - self._seen_s) / _HALF_LIFE_S)


class Admission:
    """Counts what all calls under way have taken."""

    def __init__(self, *, max_tokens: int, max_sequences: int, now_s: Callable[[], float] = monotonic_s) -> None:
        """Take the limits.

        Args:
            max_tokens: Prompt and wanted tokens of all calls under way.
            max_sequences: Sequences of all calls under way; the last one taken on may exceed it.
            now_s: The clock.
        """
        self._tokens, self._sequences = _Budget(max_tokens), _Budget(max_sequences)
        self._now_s = now_s

    @property
    def num_tokens(self) -> int:
        """Return how many tokens calls under way have taken."""
        return self._tokens.taken

    @property
    def num_sequences(self) -> int:
        """Return how many sequences are under way."""
        return self._sequences.taken

    def set_max_sequences(self, max_sequences: int) -> None:
        """Follow the number of sequences that routers run at once."""
        self._sequences.capacity = max_sequences

    def check_open(self) -> None:
        """Refuse a call that would be refused whatever it asks for.

        Raises:
            ApiError: it has to come again later.
        """
        if self._sequences.taken >= self._sequences.capacity or self._tokens.taken >= self._tokens.capacity:
            raise self._refuse(1, 1)

    @contextmanager
    def take(self, num_tokens: int, num_sequences: int) -> Iterator[None]:
        """Hold a call's share while it runs.

        Raises:
            ApiError: it has to come again later, or is larger than all there is.
        """
        if num_tokens > self._tokens.capacity:
            raise ApiError(
                f"this call may need {num_tokens} tokens, prompts and wanted tokens of all its texts; at most "
                f"{self._tokens.capacity} are allowed. Lower max_tokens or n, or send fewer prompts.",
                param="max_tokens",
            )
        is_full = self._sequences.taken >= self._sequences.capacity
        if is_full or self._tokens.taken + num_tokens > self._tokens.capacity:
            raise self._refuse(num_tokens, 1)
        self._tokens.taken += num_tokens
        self._sequences.taken += num_sequences
        try:
            yield
        finally:
            now_s = self._now_s()
            self._tokens.give_back(num_tokens, now_s)
            self._sequences.give_back(num_sequences, now_s)

    def _refuse(self, num_tokens: int, num_sequences: int) -> ApiError:
        now_s = self._now_s()
        wait_s = max(
            self._tokens.estimate_wait_s(num_tokens, now_s), self._sequences.estimate_wait_s(num_sequences, now_s)
        )
        retry_after_s = min(max(math.ceil(wait_s), 1), _MAX_RETRY_S)
        return refuse_overload(
            f"{self._sequences.taken} texts with up to {self._tokens.taken} tokens are under way, of at most "
            f"{self._sequences.capacity} and {self._tokens.capacity}. Try again in {retry_after_s} s.",
            retry_after_s=retry_after_s,
        )
