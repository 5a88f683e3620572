"""How well a model predicts text under several routing settings, and what each setting costs per token.

All settings see the same windows of the text in the same batches, and take turns batch by batch, so that their speeds
are measured side by side. Every next token of a window is a target.

Shape suffixes: B sequences, S positions, E experts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.data.token_shards import SampleOrder, TokenShards
from dsmoe_ray.errors import DataError, UserError
from dsmoe_ray.model.accounting import KeptExperts, ParameterCounts, count_parameters
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.layer_routing import LayerRouting
from dsmoe_ray.model.router import Routing
from dsmoe_ray.model.transformer import Transformer

BATCH_TOKENS = 4096
_ORDER_SEED = 0

ProgressCallback = Callable[[int, int], None]
"""Called with how many batches of how many are done, over all settings."""


@dataclass(frozen=True)
class Windows:
    """Which windows of a text are evaluated, and how many at once."""

    indices: list[int]
    seq_len: int
    batch_sequences: int

    @property
    def num_tokens(self) -> int:
        """Return the number of targets."""
        return len(self.indices) * self.seq_len

    @property
    def num_batches(self) -> int:
        """Return the number of batches; the last one may be smaller."""
        return math.ceil(len(self.indices) / self.batch_sequences)


@dataclass(frozen=True)
class RoutingQuality:
    """What one routing setting came to."""

    routing: str
    loss: float
    """Mean over all targets, in nats."""
    tokens_per_s: float
    """Of whole forward passes over batches, as in prefill."""
    kept_attention_experts: list[float]
    """Experts a token uses, on average, in each layer; empty without a mixture."""
    kept_ffn_experts: list[float]
    distinct_ffn_experts: list[float]
    """In each layer, experts that one decode step uses if all sequences of a batch take it together, on average."""
    active: ParameterCounts
    """Parameters that a token uses, on average."""

    @property
    def perplexity(self) -> float:
        """Return ``exp(loss)``, infinity where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else self.loss * math.inf


@dataclass(frozen=True)
class QualityReport:
    """What an evaluation found; all settings on the same tokens."""

    num_tokens: int
    seq_len: int
    batch_sequences: int
    parameters: ParameterCounts
    settings: list[RoutingQuality]


def plan_windows(
    shards: TokenShards, *, seq_len: int, max_tokens: int | None = None, batch_tokens: int = BATCH_TOKENS
) -> Windows:
    """Choose the windows to evaluate: all, or ``max_tokens`` worth of them spread over the text, always the same ones.

    Args:
        shards: The text.
        seq_len: Targets of a window; a shorter text is one window.
        max_tokens: Rounded down to whole windows, at least one.
        batch_tokens: Tokens that are run at once, rounded likewise.

    Raises:
        DataError: the text has fewer than two tokens.
    """
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1; found {max_tokens}")
    if shards.num_tokens < 2:
        raise DataError("the text has fewer than two tokens, so there is nothing to predict. Give more text.")
    seq_len = min(seq_len, shards.num_tokens - 1)
    available = shards.num_samples(seq_len)
    wanted = available if max_tokens is None else min(max(max_tokens // seq_len, 1), available)
    order = SampleOrder(num_samples=available, seed=_ORDER_SEED)
    indices = sorted(order.sample_index(place) for place in range(wanted))
    return Windows(indices, seq_len=seq_len, batch_sequences=min(max(batch_tokens // seq_len, 1), wanted))


@torch.inference_mode()
def measure_quality(
    model: Transformer,
    shards: TokenShards,
    settings: Mapping[str, Sequence[LayerRouting]],
    *,
    windows: Windows,
    on_progress: ProgressCallback | None = None,
) -> QualityReport:
    """Evaluate a model under each of the named routing settings."""
    tallies = {name: _Tally() for name in settings}
    done, total = 0, windows.num_batches * len(settings)
    for batch in read_batches(shards, windows, model.embedding.weight.device):
        if done == 0:
            # The first pass pays for reading weights from disk; no setting shall.
            _run(model, batch, next(iter(settings.values())), _Tally(), is_full=True)
        for name, rules in settings.items():
            _run(model, batch, rules, tallies[name], is_full=len(batch) == windows.batch_sequences)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
    return QualityReport(
        num_tokens=windows.num_tokens,
        seq_len=windows.seq_len,
        batch_sequences=windows.batch_sequences,
        parameters=count_parameters(model.config),
        settings=[tally.summarize(name, model.config) for name, tally in tallies.items()],
    )


def read_batches(shards: TokenShards, windows: Windows, device: torch.device) -> Iterator[torch.Tensor]:
    """Read the windows batch by batch, each with the token after its last position, ``(B, S + 1)``."""
    for start in range(0, len(windows.indices), windows.batch_sequences):
        indices = windows.indices[start : start + windows.batch_sequences]
        samples = [torch.from_numpy(shards.read_sample(index, windows.seq_len).tokens) for index in indices]
        yield torch.stack(samples).to(device)


@dataclass
class _Tally:
    """Sums over the batches of one setting."""

    loss_sum: float = 0.0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    kept_attention: list[list[float]] = field(default_factory=list)
    """Experts kept by all tokens of a batch, by batch and layer."""
    kept_ffn: list[list[float]] = field(default_factory=list)
    distinct_ffn: list[list[float]] = field(default_factory=list)

    def summarize(self, name: str, config: ModelConfig) -> RoutingQuality:
        attention = [kept / self.num_tokens for kept in _sum_batches(self.kept_attention)]
        ffn = [kept / self.num_tokens for kept in _sum_batches(self.kept_ffn)]
        kept = KeptExperts(attention=_mean(attention), ffn=_mean(ffn))
        return RoutingQuality(
            routing=name,
            loss=self.loss_sum / self.num_tokens,
            tokens_per_s=self.num_tokens / self.elapsed_s,
            kept_attention_experts=attention,
            kept_ffn_experts=ffn,
            distinct_ffn_experts=[distinct / len(self.distinct_ffn) for distinct in _sum_batches(self.distinct_ffn)],
            active=count_parameters(config, kept=kept),
        )


def _run(
    model: Transformer, batch: torch.Tensor, rules: Sequence[LayerRouting], tally: _Tally, *, is_full: bool
) -> None:
    start_s = monotonic_s()
    output = model(batch[:, :-1], targets_BS=batch[:, 1:], routing=rules)
    assert output.loss_sum is not None
    # Reading the value also waits for a GPU.
    tally.loss_sum += output.loss_sum.item()
    tally.elapsed_s += monotonic_s() - start_s
    tally.num_tokens += batch[:, 1:].numel()
    tally.kept_attention.append([_count_kept(decision) for decision in output.attention_routings])
    tally.kept_ffn.append([_count_kept(decision) for decision in output.ffn_routings])
    if is_full:
        tally.distinct_ffn.append([_count_distinct(decision, len(batch)) for decision in output.ffn_routings])


def _count_kept(decision: Routing) -> float:
    selected = decision.selected_TE
    return float(decision.gates_TE.numel() if selected is None else selected.sum().item())


def _count_distinct(decision: Routing, num_sequences: int) -> float:
    """Return how many experts the tokens at one position of all sequences use together, averaged over positions."""
    num_tokens, num_experts = decision.gates_TE.shape
    if decision.selected_TE is None:
        return float(num_experts)
    selected_BSE = decision.selected_TE.view(num_sequences, num_tokens // num_sequences, num_experts)
    return selected_BSE.any(0).sum(-1, dtype=torch.float32).mean().item()


def _sum_batches(rows: list[list[float]]) -> list[float]:
    return [math.fsum(column) for column in zip(*rows, strict=True)]


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
