"""How one sequence chooses its tokens, what a person may ask for, and what a choice tells. Pure data: imports no torch.

What the fields mean together, and in which order they act, is told at the top of ``inference/sampling.py``.
"""

import math
import numbers
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dsmoe_ray.errors import RequestError

MAX_LOGPROBS = 20
"""Most alternatives per position whose log probabilities are told."""
MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0
MAX_PENALTY = 2.0
"""Largest absolute value of the presence and the frequency penalty."""
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.01, 100.0
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
"""What 64 bits hold, with a sign or without."""

_MOST_SHOWN_BITS = 256


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How one sequence chooses its tokens; checked when made.

    Raises:
        RequestError: a value is impossible; its ``param`` is the field's name.
    """

    temperature: float = 0.0
    """0 takes the most likely token; 1 samples from the model's own probabilities."""
    top_k: int | None = None
    """Sample from this many most likely tokens only."""
    top_p: float = 1.0
    """Sample from the fewest most likely tokens whose probabilities reach this sum."""
    min_p: float = 0.0
    """Sample from the tokens that are at least this many times as likely as the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens that the prompt or the output has; 1 is none."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the output has."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token as many times as the output has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """None draws one when the request is made."""
    logprobs: int | None = None
    """Most likely tokens whose log probabilities come with each token; 0 tells the token's own, None nothing."""

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, low=0.0)
        check_integer("top_k", self.top_k, low=1, optional=True)
        _check_real("top_p", self.top_p, low=0.0, high=1.0, above=True)
        _check_real("min_p", self.min_p, low=0.0, high=1.0)
        _check_real(
            "repetition_penalty", self.repetition_penalty, low=MIN_REPETITION_PENALTY, high=MAX_REPETITION_PENALTY
        )
        _check_real("presence_penalty", self.presence_penalty, low=-MAX_PENALTY, high=MAX_PENALTY)
        _check_real("frequency_penalty", self.frequency_penalty, low=-MAX_PENALTY, high=MAX_PENALTY)
        check_integer("seed", self.seed, low=MIN_SEED, high=MAX_SEED, optional=True)
        check_integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS, optional=True)
        # A copy, which nobody else can change.
        object.__setattr__(self, "logit_bias", _check_logit_bias(self.logit_bias))

    @property
    def has_penalties(self) -> bool:
        """Tell whether earlier tokens matter for the next one's logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Tell whether the most likely token may be another than the model's."""
        return self.has_penalties or bool(self.logit_bias)

    @property
    def is_plain_greedy(self) -> bool:
        """Tell whether the next token is the one of the largest logit and nothing else is asked for."""
        return self.temperature == 0 and self.logprobs is None and not self.changes_logits


def check_integer(
    name: str, value: Any, *, low: int | None = None, high: int | None = None, optional: bool = False
) -> None:
    """Raise ``RequestError`` unless a field of a request is an integer in ``[low, high]``, or None if optional."""
    if value is None and optional:
        return
    if not _is_number(value, numbers.Integral):
        raise RequestError(f"{name} must be an integer; found {value!r}", param=name)
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"{low} to {high}"
        raise RequestError(f"{name} must be {bounds}; found {show_number(value)}", param=name)


def show_number(value: Any) -> str:
    """Return a number as a message tells it."""
    if isinstance(value, numbers.Integral) and int(value).bit_length() > _MOST_SHOWN_BITS:
        # Python refuses to write some out.
        return f"a number of {int(value).bit_length()} bits"
    return str(value)


def _is_number(value: Any, kind: type) -> bool:
    # Python takes True for 1.
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_real(name: str, value: Any, *, low: float, high: float = math.inf, above: bool = False) -> None:
    if not _is_number(value, numbers.Real):
        raise RequestError(f"{name} must be a number; found {value!r}", param=name)
    # Bounds first, as no float is large enough for some integers.
    if not (low <= value <= min(high, sys.float_info.max)) or (above and value == low):
        start = f"above {low:g}" if above else f"at least {low:g}"
        bounds = f"finite and {start}" if high == math.inf else f"{start} and at most {high:g}"
        raise RequestError(f"{name} must be {bounds}; found {show_number(value)}", param=name)


def _check_logit_bias(logit_bias: Any) -> dict[int, float]:
    if not isinstance(logit_bias, Mapping):
        raise RequestError(f"logit_bias must map token ids to numbers; found {logit_bias!r}", param="logit_bias")
    if len(logit_bias) > MAX_LOGIT_BIASES:
        raise RequestError(
            f"logit_bias has {len(logit_bias)} tokens; at most {MAX_LOGIT_BIASES} are allowed", param="logit_bias"
        )
    for token_id, bias in logit_bias.items():
        if not _is_number(token_id, numbers.Integral):
            raise RequestError(f"logit_bias has the key {token_id!r}, which is no token id", param="logit_bias")
        if not _is_number(bias, numbers.Real) or not abs(bias) <= MAX_LOGIT_BIAS:
            raise RequestError(
                f"logit_bias of token {token_id} must be a number from {-MAX_LOGIT_BIAS:g} to {MAX_LOGIT_BIAS:g}; "
                f"found {show_number(bias)}",
                param="logit_bias",
            )
    return {int(token_id): float(bias) for token_id, bias in logit_bias.items()}


GREEDY = SamplingConfig()
"""The most likely token, always."""


class SampledToken(NamedTuple):
    """A chosen token and, if asked for, log probabilities of the model's own distribution."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, in order."""
