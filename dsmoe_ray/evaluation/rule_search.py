"""Find rules for the FFN that keep to a budget, by measuring. Knows no model: only sizes and a way to measure a rule.

Shape suffixes: L layers, E experts.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dsmoe_ray.artifact.calibration_record import LayerProfile
from dsmoe_ray.evaluation.allocation import allocate, fill_profile
from dsmoe_ray.evaluation.rule_meter import Cost
from dsmoe_ray.model.config import RoutingConfig, RoutingMode

Measure = Callable[[str, Iterable[RoutingConfig]], list[Cost]]
"""Returns the cost of each rule; the text names the stage for whoever waits."""
Table = tuple[int, ...]

_THRESHOLD_TRIES = 8
_SPENT_ENOUGH = 0.98
"""A threshold that keeps this share of the budget is good enough."""


@dataclass(frozen=True)
class MixtureSize:
    """Layers, and experts of each."""

    num_layers: int
    num_experts: int

    def count_kept(self, budget: float) -> int:
        """Return how many experts a budget allows in all layers together."""
        # Budgets are decimal: 0.3 * 10 shall be three.
        return int(budget * self.num_layers * self.num_experts + 1e-6)


def to_rule(table: Sequence[int], num_experts: int) -> RoutingConfig:
    """Return the plainest rule that does what a table of layers says."""
    if len(set(table)) > 1:
        return RoutingConfig(mode=RoutingMode.PER_LAYER_TOP_K, per_layer_top_k=tuple(table))
    if table[0] == num_experts:
        return RoutingConfig()
    return RoutingConfig(mode=RoutingMode.TOP_K, top_k=table[0])


def choose_profiled_top_k(num_experts: int) -> list[int]:
    """Return the numbers of kept experts to measure: each about 1.4 times the one before, since losses fall so."""
    steps = itertools.takewhile(lambda k: k < num_experts, (round(2 ** (step / 2)) for step in itertools.count()))
    return sorted(set(steps))


def measure_profile(measure: Measure, size: MixtureSize) -> LayerProfile:
    """Cut one layer at a time and measure what it costs."""
    top_k = choose_profiled_top_k(size.num_experts)
    whole = [size.num_experts] * size.num_layers
    cuts = [[*whole[:layer], k, *whole[layer + 1 :]] for layer in range(size.num_layers) for k in top_k]
    rules = [to_rule(table, size.num_experts) for table in (whole, *cuts)]
    dense, *costs = measure("profile of layers", rules)
    increases = [cost.loss - dense.loss for cost in costs]
    rows = [increases[layer * len(top_k) : (layer + 1) * len(top_k)] for layer in range(size.num_layers)]
    return LayerProfile(top_k=top_k, loss_increase=rows)


def plan_table(profile: LayerProfile, budget: float, size: MixtureSize) -> Table:
    """Return the table of layers that the profile says is best."""
    increase_LE = fill_profile(profile.top_k, np.array(profile.loss_increase), num_experts=size.num_experts)
    return allocate(increase_LE, size.count_kept(budget))


def find_threshold(measure: Measure, scores: np.ndarray, budget: float, size: MixtureSize) -> RoutingConfig | None:
    """Return the threshold that keeps most within the budget, or None if none of those tried keeps to it.

    Args:
        measure: Tells what a threshold really keeps.
        scores: ``num_experts * probability`` with every expert on, ascending.
        budget: Share of the experts.
        size: Of the mixture.
    """
    best, most, aims = None, 0.0, [math.log(budget)]
    found: list[float] = []
    for _ in range(_THRESHOLD_TRIES):
        rule = threshold_at(scores, math.exp(aims[-1]), size)
        [cost] = measure("threshold", [rule])
        kept = cost.active_ffn_ratio
        if most <= kept <= budget:
            best, most = rule, kept
        if _SPENT_ENOUGH * budget <= kept <= budget:
            break
        found.append(math.log(max(kept, 1e-3 * budget)))
        aims.append(min(_aim(aims, found, math.log(0.99 * budget)), 0.0))
    return best


def _aim(aims: list[float], found: list[float], wanted: float) -> float:
    """Return where to aim next so that ``wanted`` is found: by the last two tries, as if one followed the other."""
    slope = 1.0
    if len(found) > 1 and aims[-1] != aims[-2]:
        slope = (found[-1] - found[-2]) / (aims[-1] - aims[-2])
    # What is kept always grows with what is aimed at; where chance says otherwise, small steps are safe.
    return aims[-1] + (wanted - found[-1]) / min(max(slope, 0.5), 4.0)


def threshold_at(scores: np.ndarray, share: float, size: MixtureSize) -> RoutingConfig:
    """Return the threshold, three digits long, above which about this share of the scores lies."""
    index = min(int((1.0 - share) * len(scores)), len(scores) - 1)
    threshold = 0.0 if share >= 1.0 else float(f"{scores[index]:.3g}")
    return RoutingConfig(mode=RoutingMode.THRESHOLD, threshold=min(threshold, 0.999 * size.num_experts))
