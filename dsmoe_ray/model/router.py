"""Scoring the experts of a mixture and choosing among them.

``Router`` owns the scoring network. ``select`` is the one definition of every routing rule. Routing is float32.

Shape suffixes: T tokens, D model width, E experts.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from dsmoe_ray.model.config import RouterConfig, RoutingConfig, RoutingMode
from dsmoe_ray.model.layer_routing import DENSE


class Routing(NamedTuple):
    """What a router decided for a batch of tokens; all ``(T, E)``."""

    router_logits_TE: torch.Tensor
    router_probs_TE: torch.Tensor
    gates_TE: torch.Tensor
    """Weight of each expert's output; zero where not selected."""
    selected_TE: torch.Tensor | None
    """True where an expert is used; None when all are."""


class Router(nn.Module):
    """Score all experts of a layer per token: a linear map, or an MLP with one hidden layer."""

    def __init__(self, config: RouterConfig, *, num_experts: int, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.force_balanced = False
        self.hidden = None
        if config.d_hidden is not None:
            self.hidden = nn.Linear(d_model, config.d_hidden, bias=False)
        self.proj = nn.Linear(config.d_hidden or d_model, num_experts, bias=False)

    def forward(self, x_TD: torch.Tensor, routing: RoutingConfig = DENSE) -> Routing:
        """Return logits, probabilities and gates under ``routing``."""
        if self.hidden is not None:
            # The hidden layer holds nearly all of the router's FLOPs and runs in the compute type; scores do not.
            x_TD = functional.silu(functional.linear(x_TD, self.hidden.weight.to(x_TD.dtype)))
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        router_logits_TE = functional.linear(x_TD.to(dtype), self.proj.weight.to(dtype))
        if self.force_balanced:
            router_logits_TE = router_logits_TE * 0.0
        router_probs_TE = router_logits_TE.softmax(dim=-1)
        gates_TE, selected_TE = select(router_probs_TE, routing, renormalize=self.config.gates == "renormalized")
        if self.force_balanced and selected_TE is not None:
            gates_TE, selected_TE = _rotate(gates_TE), _rotate(selected_TE)
        return Routing(router_logits_TE, router_probs_TE, gates_TE * self.config.gate_scale, selected_TE)


def select(
    router_probs_TE: torch.Tensor, routing: RoutingConfig, *, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply a routing rule.

    Args:
        router_probs_TE: Probabilities over all experts ``(T, E)``.
        routing: The rule. Ties go to the lower expert id.
        renormalize: Make the gates of each token's selected experts sum to one.

    Returns:
        Gates ``(T, E)``, zero where not selected, and the selection, or None if every expert is selected.
    """
    selected_TE = _selection(router_probs_TE, routing)
    if selected_TE is None:
        return router_probs_TE, None
    gates_TE = router_probs_TE.masked_fill(~selected_TE, 0.0)
    if renormalize:
        # A threshold may leave a token without experts; its gates stay zero.
        gates_TE = gates_TE / gates_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(gates_TE.dtype).tiny)
    return gates_TE, selected_TE


def _rotate(choice_TE: torch.Tensor) -> torch.Tensor:
    """Move the choice of token t on by t experts: ties go to the lowest ids, so equal tokens would all share those."""
    num_tokens, num_experts = choice_TE.shape
    tokens_T, experts_E = (torch.arange(size, device=choice_TE.device) for size in (num_tokens, num_experts))
    return choice_TE.gather(-1, (experts_E - tokens_T[:, None]) % num_experts)


def _selection(router_probs_TE: torch.Tensor, routing: RoutingConfig) -> torch.Tensor | None:
    probs_TE = router_probs_TE.detach()
    num_experts = probs_TE.shape[-1]
    if routing.mode is RoutingMode.DENSE:
        return None
    if routing.mode is RoutingMode.TOP_K:
        assert routing.top_k is not None
        return None if routing.top_k == num_experts else _top_k_mask(probs_TE, routing.top_k)
    if routing.mode is RoutingMode.TOP_P:
        assert routing.top_p is not None
        return _top_p_mask(probs_TE, routing.top_p)
    assert routing.threshold is not None
    kept_TE = probs_TE * num_experts > routing.threshold
    if routing.mode is RoutingMode.THRESHOLD:
        return kept_TE
    mean_kept = kept_TE.sum(-1, dtype=torch.float32).mean()
    top_k = min(max(int(mean_kept.round().item()), 1), num_experts)
    return _top_k_mask(probs_TE, top_k)


def _top_k_mask(probs_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    # A stable sort, unlike topk, breaks ties the same way on every device and batch.
    order_TE = probs_TE.sort(dim=-1, descending=True, stable=True).indices
    mask_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
    return mask_TE.scatter_(-1, order_TE[:, :top_k], True)


def _top_p_mask(probs_TE: torch.Tensor, top_p: float) -> torch.Tensor:
    sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    # Shifted, not cumsum minus own: a difference would round, and a sum that just reaches top_p could fall short again.
    before_TE = functional.pad(sorted_TE.cumsum(-1)[:, :-1], (1, 0))
    mask_TE = torch.zeros_like(probs_TE, dtype=torch.bool)
    return mask_TE.scatter_(-1, order_TE, before_TE < top_p)
