"""What a routing rule for the FFN loses and uses on a text; each rule is measured once. Attention runs as deployed.

Shape suffixes: T tokens, E experts.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.evaluation.quality import Windows, measure_quality, read_batches
from dsmoe_ray.inference.routing import deployed_rules
from dsmoe_ray.model.config import MoeConfig, RoutingConfig
from dsmoe_ray.model.layer_routing import LayerRouting, expand_routing
from dsmoe_ray.model.transformer import Transformer

_MAX_SCORES = 1 << 20

StageCallback = Callable[[str, int, int], None]
"""Called with the name of a stage, and how many batches of how many of it are done."""


@dataclass(frozen=True)
class Cost:
    """What a rule was measured to lose and to use."""

    loss: float
    """Mean over all targets, in nats."""
    active_ffn_ratio: float
    """Share of the FFN experts in use, averaged over tokens and layers."""


class RuleMeter:
    """Measures rules on the same windows of a text."""

    def __init__(
        self, model: Transformer, shards: TokenShards, windows: Windows, *, on_progress: StageCallback | None = None
    ) -> None:
        assert isinstance(model.config.ffn, MoeConfig)
        self._num_experts = model.config.ffn.num_experts
        self._model, self._shards, self._windows = model, shards, windows
        self._on_progress = on_progress
        self._known: dict[RoutingConfig, Cost] = {}

    def measure(self, stage: str, rules: Iterable[RoutingConfig]) -> list[Cost]:
        """Return the cost of each rule."""
        wanted = list(rules)
        unknown = {rule.to_spec(): rule for rule in wanted if rule not in self._known}
        if unknown:
            report = measure_quality(
                self._model,
                self._shards,
                {spec: self._expand(rule) for spec, rule in unknown.items()},
                windows=self._windows,
                on_progress=None if self._on_progress is None else partial(self._on_progress, stage),
            )
            for setting in report.settings:
                kept = setting.kept_ffn_experts
                ratio = math.fsum(kept) / len(kept) / self._num_experts
                self._known[unknown[setting.routing]] = Cost(setting.loss, ratio)
        return [self._known[rule] for rule in wanted]

    @torch.inference_mode()
    def collect_scores(self) -> np.ndarray:
        """Return ``num_experts * probability`` over tokens, experts and layers, with every expert on, ascending.

        At most a million of them, from tokens spread evenly over the text. A threshold at the quantile ``1 - r`` keeps
        the share r, but for what the cut in one layer does to the routers of the next.
        """
        model, windows = self._model, self._windows
        stride = math.ceil(windows.num_tokens * model.config.num_layers * self._num_experts / _MAX_SCORES)
        found = []
        for batch in read_batches(self._shards, windows, model.embedding.weight.device):
            output = model(batch[:, :-1], routing=self._expand(RoutingConfig()), last_logits_only=True)
            probs = [decision.router_probs_TE[::stride].flatten() for decision in output.ffn_routings]
            found += [self._num_experts * probs_of_layer.cpu() for probs_of_layer in probs]
        return np.sort(torch.cat(found).numpy())

    def _expand(self, rule: RoutingConfig) -> list[LayerRouting]:
        config = self._model.config
        return expand_routing(deployed_rules(config).attention, rule, num_layers=config.num_layers)
