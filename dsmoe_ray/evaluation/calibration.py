"""Choose the routing of the FFN experts for a compute budget, at the least loss on some text.

Attention runs as deployed. A budget is the largest share of the FFN experts that a token may use, averaged over tokens
and layers; all experts are alike, so it is the share of their parameters and FLOPs as well. The windows of the text are
dealt out to two halves: every choice is made on the one, the other tells what the choice is worth on text that had no
part in it.

1. Profile: the loss with one layer cut to k experts and every other whole, for each layer and some k.
2. Tables of layers: the best share-out by that profile (``allocation.py``).
3. Threshold: the quantile of the routers' scores that keeps the budget, corrected by what it is measured to keep.
4. The least loss among table, threshold and uniform top-k is the choice, so it is never worse than uniform top-k.
"""

import math
from dataclasses import dataclass, replace
from typing import get_args

from dsmoe_ray.artifact.calibration_record import CalibrationMethod, LayerProfile
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.errors import DataError, UserError
from dsmoe_ray.evaluation.quality import Windows
from dsmoe_ray.evaluation.rule_meter import Cost, RuleMeter, StageCallback
from dsmoe_ray.evaluation.rule_search import (
    MixtureSize,
    find_threshold,
    measure_profile,
    plan_table,
    threshold_at,
    to_rule,
)
from dsmoe_ray.inference.routing import deployed_rules
from dsmoe_ray.model.config import ModelConfig, MoeConfig, RoutingConfig, RoutingMode
from dsmoe_ray.model.transformer import Transformer

MIN_TOKENS = 2048
"""With fewer, chance outweighs what routings differ by."""
_MODES = {
    "per_layer_top_k": {RoutingMode.PER_LAYER_TOP_K, RoutingMode.TOP_K, RoutingMode.DENSE},
    "threshold": {RoutingMode.THRESHOLD},
}


@dataclass(frozen=True)
class FrontierRow:
    """One rule for the FFN, measured on the half that chose and on the half that did not."""

    rule: RoutingConfig
    selection: Cost
    held_out: Cost


@dataclass(frozen=True)
class Calibration:
    """What a calibration found."""

    budget: float
    method: CalibrationMethod
    chosen: FrontierRow
    deployed_before: RoutingConfig
    frontier: list[FrontierRow]
    """By what they keep on the held-out half, the most first."""
    profile: LayerProfile | None
    """None if no table of layers was asked for."""
    selection: Windows
    held_out: Windows


def parse_method(method: str) -> CalibrationMethod:
    """Return the method of that name.

    Raises:
        UserError: there is none.
    """
    for known in get_args(CalibrationMethod):
        if method == known:
            return known
    raise UserError(f"--method must be one of {', '.join(get_args(CalibrationMethod))}; found {method!r}")


def check_budget(budget: float, config: ModelConfig) -> MixtureSize:
    """Return the size of the mixture to calibrate.

    Raises:
        UserError: the model has no mixture, or none that the budget is possible in.
    """
    if not isinstance(config.ffn, MoeConfig):
        raise UserError("this model has one dense FFN: there are no experts to choose from, so nothing to calibrate.")
    size = MixtureSize(config.num_layers, config.ffn.num_experts)
    # Put so that it also refuses what is not a number.
    if not (0.0 < budget <= 1.0 and size.count_kept(budget) >= size.num_layers):
        raise UserError(
            f"--budget must be from {math.ceil(1e4 / size.num_experts) / 1e4:g}, one of {size.num_experts} experts, "
            f"to 1, all of them; found {budget:g}"
        )
    return size


def split_windows(windows: Windows) -> tuple[Windows, Windows]:
    """Deal the windows out to the half that choices are made on and the half that judges them.

    Raises:
        DataError: there are too few tokens.
    """
    if windows.num_tokens < MIN_TOKENS or len(windows.indices) < 2:
        raise DataError(
            f"calibration needs {MIN_TOKENS} tokens in two windows at least; found {windows.num_tokens} in "
            f"{len(windows.indices)} of {windows.seq_len}. Give more text, more --max-tokens or a smaller --seq-len."
        )
    halves = (windows.indices[0::2], windows.indices[1::2])
    selection, held_out = (
        replace(windows, indices=half, batch_sequences=min(windows.batch_sequences, len(half))) for half in halves
    )
    return selection, held_out


def calibrate(
    model: Transformer,
    shards: TokenShards,
    *,
    budget: float,
    method: CalibrationMethod,
    windows: Windows,
    on_progress: StageCallback | None = None,
) -> Calibration:
    """Find the rule for the FFN that loses least within a budget.

    Args:
        model: The published model.
        shards: The text.
        budget: Largest share of the FFN experts in use.
        method: ``per_layer_top_k`` or ``threshold``, or ``auto`` for the better one. Where no table of layers is better
            than uniform top-k, that is taken.
        windows: What of the text is read, see ``plan_windows``.
        on_progress: Called with the name of the stage and how much of it is done.

    Raises:
        UserError: the model, the budget or the text does not allow it.
    """
    size = check_budget(budget, model.config)
    selection, held_out = split_windows(windows)
    meter = RuleMeter(model, shards, selection, on_progress=on_progress)
    deployed = deployed_rules(model.config).ffn
    rules = [RoutingConfig(), deployed, *_uniform_rules(budget, size)]
    _check_finite(meter.measure("plain rules", rules)[0])
    profile = None
    if method != "threshold":
        profile = measure_profile(meter.measure, size)
        rules += _table_rules(profile, budget, size)
    rules += _find_thresholds(meter, budget, size)
    chosen = _choose(rules, meter.measure("frontier", rules), budget, method)
    rows = _judge(list(dict.fromkeys(rules)), meter, RuleMeter(model, shards, held_out, on_progress=on_progress))
    return Calibration(
        budget=budget,
        method=method,
        chosen=next(row for row in rows if row.rule == chosen),
        deployed_before=deployed,
        frontier=rows,
        profile=profile,
        selection=selection,
        held_out=held_out,
    )


def _shares(budget: float, size: MixtureSize) -> list[float]:
    """Return the budgets of the frontier: one expert, two, four, ... and the one that was asked for."""
    counts = [2**power for power in range(size.num_experts.bit_length()) if 2**power < size.num_experts]
    return sorted({budget, *(count / size.num_experts for count in counts)})


def _uniform_rules(budget: float, size: MixtureSize) -> list[RoutingConfig]:
    counts = [size.count_kept(share) // size.num_layers for share in _shares(budget, size)]
    return [to_rule([top_k] * size.num_layers, size.num_experts) for top_k in counts]


def _table_rules(profile: LayerProfile, budget: float, size: MixtureSize) -> list[RoutingConfig]:
    tables = [plan_table(profile, share, size) for share in _shares(budget, size)]
    return [to_rule(table, size.num_experts) for table in tables]


def _find_thresholds(meter: RuleMeter, budget: float, size: MixtureSize) -> list[RoutingConfig]:
    scores = meter.collect_scores()
    found = find_threshold(meter.measure, scores, budget, size)
    others = [threshold_at(scores, share, size) for share in _shares(budget, size) if share != budget]
    return others if found is None else [*others, found]


def _choose(rules: list[RoutingConfig], costs: list[Cost], budget: float, method: CalibrationMethod) -> RoutingConfig:
    modes = _MODES["per_layer_top_k"] | _MODES["threshold"] if method == "auto" else _MODES[method]
    fitting = [
        (cost.loss, cost.active_ffn_ratio, rule.to_spec(), rule)
        for rule, cost in zip(rules, costs, strict=True)
        # The share is a mean over layers, which rounds.
        if rule.mode in modes and cost.active_ffn_ratio <= budget * (1 + 1e-9)
    ]
    if not fitting:
        raise UserError(
            f"no threshold that was tried keeps to --budget {budget:g}. Raise it, or choose another method."
        )
    return min(fitting, key=lambda entry: entry[:3])[-1]


def _judge(rules: list[RoutingConfig], meter: RuleMeter, judge: RuleMeter) -> list[FrontierRow]:
    selection, held_out = meter.measure("frontier", rules), judge.measure("other half", rules)
    rows = [FrontierRow(*entry) for entry in zip(rules, selection, held_out, strict=True)]
    return sorted(rows, key=lambda row: (-row.held_out.active_ffn_ratio, row.held_out.loss))


def _check_finite(dense: Cost) -> None:
    if not math.isfinite(dense.loss):
        raise DataError("the model's loss on this text is not finite, so routings cannot be compared by it.")
