"""What one step and one held-out evaluation measure, as plain numbers."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step, the same on every rank; losses are means over the global batch."""

    step: int
    """Steps done, this one included."""
    loss: float
    """Next-token cross-entropy in nats."""
    loss_total: float
    """With the weighted router losses."""
    mi_attention: float
    """Mutual-information loss of attention routers, mean over layers, in nats."""
    mi_ffn: float
    router_entropy_ffn: float
    """Mean entropy of a token's FFN router probabilities, mean over layers, in nats."""
    load_balance: float
    router_z: float
    balance: float
    """Largest over mean load of an FFN expert, mean over layers; 1 is even."""
    grad_norm: float
    lr: float
    tokens: int
    """Tokens of this step over all ranks."""
    step_time_s: float
    skipped: bool
    """The loss or the gradient was not finite and no update was made."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for one line of ``metrics.jsonl``."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """Held-out loss in nats per token, with every expert on and as deployed."""

    step: int
    loss_dense: float
    loss_sparse: float
    tokens: int
    load_share: list[list[float]]
    """Share of deployed FFN routing that each expert receives, layer by layer; empty without a mixture."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values for one line of ``metrics.jsonl``'s neighbour ``events.jsonl``."""
        return asdict(self)
