"""What travels, one class a message, with its way into a frame and back. Knows no transport.

Shape letters: T tokens of a call, D model width, K experts that a token wants at this host, P (token, expert) pairs.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from dsmoe_ray.inference.outputs import SequenceOutput
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.serving.plan import PlacementPlan


class Kind(IntEnum):
    """What a frame is."""

    EXPERT_CALL = 1
    EXPERT_RESULT = 2
    EXPERT_REFUSAL = 3
    PLAN = 4
    GENERATE = 16
    CANCEL = 17
    OUTPUTS = 18
    ROUTER_STATUS = 19
    REJECTED = 20


# Calls and results are made for every layer of every step; frozen, each would take some microseconds more.
@dataclass(kw_only=True, slots=True)
class ExpertCall:
    """Router to host: what some experts of one layer say to some tokens."""

    call_id: int
    """Chosen by the router, unique on its connection."""
    layer: int
    plan_version: int
    """The plan that the router chose this host by."""
    exact: bool
    """Whether one row per (token, expert) comes back instead of a gated sum per token."""
    deadline_ms: int
    """How long the router will wait; after that nobody reads the answer."""
    dtype: Literal["float32", "bfloat16"]
    """Of the hidden states, and of the answer unless ``exact``."""
    x_TD: np.ndarray
    """Each token's normed hidden states once, however many of its experts live there; bfloat16 as uint16."""
    expert_ids_TK: np.ndarray
    """int32, ascending per token, then -1."""
    gates_TK: np.ndarray
    """float32; 0 where the id is -1."""
    on_demand: bool = False
    """Load what is not held, whatever the plan says: nobody is left who holds it."""


@dataclass(kw_only=True, slots=True)
class ExpertResult:
    """Host to router: the outputs of a call."""

    call_id: int
    compute_us: int
    queue_us: int
    y: np.ndarray
    """``(T, D)`` gated sums in the call's dtype, or, when exact, float32 ``(P, D)`` gated rows, token by token in
    ascending order of expert ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRefusal:
    """Host to router: nothing was computed, ask another replica."""

    call_id: int
    reason: Literal["not_held", "overloaded", "failed"]
    message: str
    missing: tuple[int, ...] = ()
    """Ids of the call's experts that are not held, with ``not_held``; the others may be asked of this host again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanMessage:
    """Host to router, unasked: a newer plan than the one of the router's last call."""

    plan: PlacementPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateMessage:
    """Gateway to router: continue a prompt."""

    request_id: str
    """Chosen by the gateway, never used again on its connection."""
    request: GenerationRequest
    deadline_ms: int | None = None
    """How long its answer is worth anything, from now on; None as long as it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CancelMessage:
    """Gateway to router: nobody reads these any more."""

    request_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputsMessage:
    """Router to gateway: everything that one engine step added to this gateway's sequences."""

    outputs: tuple[SequenceOutput, ...]


RejectReason = Literal["invalid", "full", "leaving", "failed", "expired"]
"""``full`` and ``leaving``: another router may take it. ``failed``: its steps did, again and again. ``expired``: it
took longer than its deadline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedMessage:
    """Router to gateway: a request was not taken, or fails as a whole."""

    request_id: str
    reason: RejectReason
    message: str
    param: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterStatusMessage:
    """Router to gateway, when it changes and at least every second: how busy it is."""

    num_running: int
    num_waiting: int
    num_free_tokens: int
    """Positions left in the KV cache."""
    num_outstanding_tokens: int = 0
    """Tokens of prompts and wanted tokens of everything that it has taken on and not finished."""
    step_age_ms: int = 0
    """How long its current step has lasted; 0 between two steps."""
    leaving: bool = False
    """It stops soon: take the sequences elsewhere."""
