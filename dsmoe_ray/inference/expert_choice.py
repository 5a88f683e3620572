"""Which experts each token of a step uses, for tokens with different rules and without a question to the device.

Every rule keeps the first few experts of a token in falling order of probability; rules differ in how many. So one sort
and a count per token serve all rules at once, and a CUDA graph holds for any of them. The rules themselves are defined
in ``model/router.py``; ``threshold_top_k`` takes its mean over the step's tokens with that rule, or, if exact, over the
token alone.

Shape suffixes: T tokens, E experts, K most experts that a token may use, B sequences, G groups of tokens with one rule.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dsmoe_ray.model.config import RoutingConfig, RoutingMode
from dsmoe_ray.model.dispatch import ExpertAssignment

# What a token that does not have a parameter gets for it: it keeps every expert.
_EVERY_PROBABILITY, _NO_THRESHOLD = 2.0, -1.0
NO_GROUP = -1


class RulesShape(NamedTuple):
    """What is known of a mixture's rules before looking at tokens; decides which operations run."""

    most_experts: int
    """No token uses more."""
    threshold: bool = False
    threshold_top_k: bool = False
    top_p: bool = False
    uniform: bool = False
    """Every token uses exactly ``most_experts``."""


class RuleNumbers(NamedTuple):
    """Rules as numbers, one entry for each rule."""

    top_k: np.ndarray
    """int64."""
    group: np.ndarray
    """int64: tokens of one group share a ``threshold_top_k`` rule; -1 for none."""
    threshold: np.ndarray
    """Float32."""
    top_p: np.ndarray
    """Float32."""


class TokenRules(NamedTuple):
    """The rules of one mixture, token by token; see ``RuleNumbers``. The tensors may be empty if rules are uniform."""

    shape: RulesShape
    top_k_T: torch.Tensor
    group_T: torch.Tensor
    threshold_T: torch.Tensor
    top_p_T: torch.Tensor


def tabulate(rules: Sequence[RoutingConfig], num_experts: int) -> tuple[RulesShape, RuleNumbers]:
    """Return rules of one mixture as numbers that ``choose`` compares with."""
    modes = {rule.mode for rule in rules}
    top_k = [rule.top_k if rule.top_k is not None else num_experts for rule in rules]
    threshold = [rule.threshold if rule.threshold is not None else _NO_THRESHOLD for rule in rules]
    top_p = [rule.top_p if rule.top_p is not None else _EVERY_PROBABILITY for rule in rules]
    by_mean = list(dict.fromkeys(rule for rule in rules if rule.mode is RoutingMode.THRESHOLD_TOP_K))
    group = [by_mean.index(rule) if rule in by_mean else NO_GROUP for rule in rules]
    shape = RulesShape(
        most_experts=max(top_k),
        threshold=bool(modes & {RoutingMode.THRESHOLD, RoutingMode.THRESHOLD_TOP_K}),
        threshold_top_k=bool(by_mean),
        top_p=RoutingMode.TOP_P in modes,
        uniform=modes <= {RoutingMode.DENSE, RoutingMode.TOP_K} and len(set(top_k)) == 1,
    )
    numbers = RuleNumbers(
        np.array(top_k, np.int64),
        np.array(group, np.int64),
        np.array(threshold, np.float32),
        np.array(top_p, np.float32),
    )
    return shape, numbers


class Choice(NamedTuple):
    """The experts that tokens use, best first."""

    probs_TE: torch.Tensor
    order_TE: torch.Tensor | None
    """Experts in falling order of probability; equal ones in ascending order. None if all are used."""
    num_kept_T: torch.Tensor | None
    """How many of them a token uses; None if each uses ``most_experts``."""
    normalizer_T1: torch.Tensor | None
    """What to divide gates by."""
    most_experts: int
    gate_scale: float

    def all_gates(self) -> torch.Tensor:
        """Return the gate of every expert ``(T, E)``, zero where not used."""
        if self.order_TE is None:
            return self.probs_TE * self.gate_scale
        kept_TE = torch.zeros_like(self.probs_TE, dtype=torch.bool).scatter(-1, self.order_TE, self._kept())
        return self._scale(self.probs_TE.masked_fill(~kept_TE, 0.0))

    def assignment(self, *, shrink: bool) -> ExpertAssignment:
        """Return who uses whom.

        Args:
            shrink: Ask the device how many experts a token uses at most, rather than leaving room for all it might.
        """
        num_tokens, num_experts = self.probs_TE.shape
        if self.order_TE is None:
            ids_E = torch.arange(num_experts, dtype=torch.int32, device=self.probs_TE.device)
            return ExpertAssignment(ids_E.repeat(num_tokens, 1), self.probs_TE * self.gate_scale, all_experts=True)
        width = self.most_experts
        if shrink and self.num_kept_T is not None:
            width = max(int(self.num_kept_T.max()), 1)
        ids_TK = self.order_TE[:, :width].masked_fill(~self._kept()[:, :width], num_experts).sort(dim=-1).values
        padding_TK = ids_TK == num_experts
        gates_TK = self.probs_TE.gather(-1, ids_TK.masked_fill(padding_TK, 0)).masked_fill(padding_TK, 0.0)
        return ExpertAssignment(ids_TK.masked_fill(padding_TK, -1).int(), self._scale(gates_TK))

    def _kept(self) -> torch.Tensor:
        return _is_kept(self.probs_TE, self.num_kept_T, self.most_experts)

    def _scale(self, gates: torch.Tensor) -> torch.Tensor:
        if self.normalizer_T1 is not None:
            gates = gates / self.normalizer_T1
        return gates * self.gate_scale


def choose(probs_TE: torch.Tensor, rules: TokenRules, *, renormalize: bool, gate_scale: float, exact: bool) -> Choice:
    """Apply each token's rule to its probabilities."""
    num_experts = probs_TE.shape[1]
    if rules.shape.uniform and rules.shape.most_experts == num_experts:
        return Choice(probs_TE, None, None, None, num_experts, gate_scale)
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    num_kept_T = None if rules.shape.uniform else _count_kept(sorted_TE, rules, exact=exact)
    normalizer_T1 = None
    if renormalize:
        normalizer_T1 = _sum_kept(sorted_TE, num_kept_T, rules.shape.most_experts)
    return Choice(probs_TE, order_TE, num_kept_T, normalizer_T1, rules.shape.most_experts, gate_scale)


def _count_kept(sorted_TE: torch.Tensor, rules: TokenRules, *, exact: bool) -> torch.Tensor:
    num_experts = sorted_TE.shape[1]
    num_kept_T = rules.top_k_T
    if rules.shape.threshold:
        above_T = (sorted_TE * num_experts > rules.threshold_T[:, None]).sum(-1)
        if rules.shape.threshold_top_k:
            above_T = torch.where(rules.group_T < 0, above_T, _mean_count(above_T, rules.group_T, exact=exact))
        num_kept_T = num_kept_T.minimum(above_T)
    if rules.shape.top_p:
        # Shifted, not cumsum minus own: a difference would round.
        before_TE = torch.nn.functional.pad(sorted_TE.cumsum(-1)[:, :-1], (1, 0))
        num_kept_T = num_kept_T.minimum((before_TE < rules.top_p_T[:, None]).sum(-1))
    return num_kept_T


def _mean_count(above_T: torch.Tensor, group_T: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """Return the rounded mean count of each token's group, at least 1; of the token alone if exact."""
    if exact:
        return above_T.clamp_min(1)
    # There are at most as many groups as tokens.
    member_TG = (group_T[:, None] == torch.arange(len(group_T), device=group_T.device)).float()
    mean_G = (above_T.float() @ member_TG) / member_TG.sum(0).clamp_min(1.0)
    return mean_G.round().clamp_min(1.0).long()[group_T.clamp_min(0)]


def _sum_kept(sorted_TE: torch.Tensor, num_kept_T: torch.Tensor | None, most_experts: int) -> torch.Tensor:
    num_experts = sorted_TE.shape[1]
    kept_TE = _is_kept(sorted_TE, num_kept_T, most_experts)
    # Over all experts, however many are kept, and so always in one order of additions. A threshold may leave none.
    sum_T1 = sorted_TE.masked_fill(~kept_TE, 0.0).sum(-1, keepdim=True).clamp_min(torch.finfo(sorted_TE.dtype).tiny)
    if num_kept_T is None:
        return sum_T1
    # Where all are kept their probabilities are the gates, as they are.
    return sum_T1.masked_fill((num_kept_T == num_experts)[:, None], 1.0)


def _is_kept(like_TE: torch.Tensor, num_kept_T: torch.Tensor | None, most_experts: int) -> torch.Tensor:
    """Return who is kept, in falling order of probability, ``(T, E)``."""
    rank_E = torch.arange(like_TE.shape[1], device=like_TE.device)
    if num_kept_T is None:
        return (rank_E < most_experts).expand(like_TE.shape)
    return rank_E < num_kept_T[:, None]
