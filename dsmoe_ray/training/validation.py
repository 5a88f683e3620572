"""What a run would cost and whether it can work, told before it starts. Loads no torch and starts nothing.

``build_report`` does all of it; the command line prints it for ``validate`` and for ``train --dry-run``.
"""

from dataclasses import asdict, dataclass
from typing import Any

from dsmoe_ray.model.accounting import (
    ALL_EXPERTS,
    KeptExperts,
    ParameterCounts,
    compute_decode_bytes,
    compute_forward_flops,
    compute_training_flops,
    count_kept,
    count_parameters,
    mean_causal_context,
)
from dsmoe_ray.model.config import MoaConfig, MoeConfig
from dsmoe_ray.parallel.footprint import (
    RankMemory,
    RankTraffic,
    StepShape,
    compute_rank_memory,
    compute_rank_traffic,
)
from dsmoe_ray.training.config import TrainingRunConfig, TrainRoutingConfig
from dsmoe_ray.training.run_checks import Check, describe_deployed, run_checks


@dataclass(frozen=True)
class FlopCounts:
    """FLOPs per token."""

    forward: float
    """All experts on, causal sequences of ``train.seq_len``."""
    forward_deployed: float | None
    """Under the deployed routing; None where only data can tell how many experts it keeps."""
    training: float
    """Forward and backward: what utilisation is measured by."""
    training_with_recomputation: float
    """What is really computed under ``train.activation_checkpointing``."""


@dataclass(frozen=True)
class Report:
    """What ``validate`` prints."""

    name: str
    num_ranks: int
    num_steps: int
    num_tokens: int
    num_micro_steps: int
    deployed_routing: str
    parameters: ParameterCounts
    active: ParameterCounts | None
    """Used per token under the deployed routing; None where only data can tell."""
    flops_per_token: FlopCounts
    decode_bytes: float | None
    """Read per decoded token at batch 1, bfloat16, under the deployed routing, with half the longest context cached."""
    memory: RankMemory
    traffic: RankTraffic
    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        """Checks that stop the run."""
        return [check for check in self.checks if check.status == "failed"]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, sums included."""
        values = asdict(self)
        for name, counts in (("parameters", self.parameters), ("active", self.active)):
            if counts is not None:
                values[name] |= {"total": counts.total, "non_embedding": counts.non_embedding}
        values["memory"]["total_bytes"] = self.memory.total_bytes
        return {"ok": not self.failed, **values}


def build_report(config: TrainingRunConfig) -> Report:
    """Work out parameters, FLOPs, memory, traffic and checks of one run."""
    train, model = config.train, config.model
    num_micro_steps = config.sequences_per_rank // config.sequences_per_micro_step
    shape = StepShape(
        num_tokens_per_micro_step=config.sequences_per_micro_step * train.seq_len,
        num_micro_steps=num_micro_steps,
        dtype=train.dtype,
        activation_checkpointing=train.activation_checkpointing,
    )
    deployed = compute_deployed_kept(config)
    half_context = model.max_seq_len // 2
    return Report(
        name=config.run.name,
        num_ranks=config.parallel.world_size,
        num_steps=train.steps,
        num_tokens=train.steps * train.num_tokens_per_step,
        num_micro_steps=num_micro_steps,
        deployed_routing=describe_deployed(config),
        parameters=count_parameters(model),
        active=None if deployed is None else count_parameters(model, kept=deployed),
        flops_per_token=_count_flops(config, deployed),
        decode_bytes=None
        if deployed is None
        else compute_decode_bytes(model, context_tokens=half_context, kept=deployed),
        memory=compute_rank_memory(model, config.parallel, shape),
        traffic=compute_rank_traffic(model, config.parallel, shape),
        checks=run_checks(config),
    )


def compute_deployed_kept(config: TrainingRunConfig) -> KeptExperts | None:
    """Return the experts kept per token at inference, or None where only data can tell."""
    attention, ffn = config.model.attention, config.model.ffn
    kept_attention = kept_ffn = None
    if isinstance(attention, MoaConfig):
        kept_attention = count_kept(attention.router.inference, attention.num_experts)
        if kept_attention is None:
            return None
    if isinstance(ffn, MoeConfig):
        kept_ffn = count_kept(ffn.router.inference, ffn.num_experts)
        if kept_ffn is None:
            return None
    return KeptExperts(attention=kept_attention, ffn=kept_ffn)


def _count_flops(config: TrainingRunConfig, deployed: KeptExperts | None) -> FlopCounts:
    model, train = config.model, config.train
    context_tokens = mean_causal_context(train.seq_len)
    trained = KeptExperts(
        attention=_kept_in_training(train.routing_attention), ffn=_kept_in_training(train.routing_ffn)
    )
    with_recomputation = compute_training_flops(
        model, seq_len=train.seq_len, kept=trained, activation_checkpointing=train.activation_checkpointing
    )
    return FlopCounts(
        forward=compute_forward_flops(model, context_tokens=context_tokens, kept=ALL_EXPERTS),
        forward_deployed=None
        if deployed is None
        else compute_forward_flops(model, context_tokens=context_tokens, kept=deployed),
        training=compute_training_flops(model, seq_len=train.seq_len, kept=trained),
        training_with_recomputation=with_recomputation,
    )


def _kept_in_training(routing: TrainRoutingConfig) -> float | None:
    # A k that changes with the step is counted as dense, the most it costs.
    return float(routing.top_k) if routing.mode == "top_k" and routing.top_k is not None else None
