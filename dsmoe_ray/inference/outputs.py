"""What the engine says of a sequence after a step, and of itself. Pure data."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from dsmoe_ray.errors import DsmoeError
from dsmoe_ray.inference.sampling_config import SampledToken

FinishReason = Literal["stop", "length", "error"]
"""``stop``: the end-of-text token, a stop token or a stop string. ``length``: ``max_tokens`` or the model's longest
sequence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceOutput:
    """What one step added to one sequence."""

    request_id: Hashable
    sequence_idx: int
    """Which of the request's ``n`` continuations it is."""
    token: SampledToken | None
    """None where the sequence ended without one: a token that ends the text is not part of it."""
    text: str
    """Text that is certain since this step: whole characters, nothing of a stop string."""
    prompt_logprobs: tuple[SampledToken, ...] | None = None
    """With a sequence's first output, if asked for: those of the prompt's tokens after the first."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or the token that ended the text."""
    error: DsmoeError | None = None
    """Why it ended, with the finish reason ``error``."""


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """How busy an engine is, and what it has done so far."""

    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    """Blocks that a new sequence can find, in use or not."""
    kv_cache_bytes: int
    num_steps: int
    num_computed_tokens: int
    """Tokens that went through the model, those of prompts and those computed again included."""
    num_prefix_hit_tokens: int
    num_preemptions: int
    num_generated_tokens: int
