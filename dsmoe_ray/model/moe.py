"""The feed-forward half of a block: a mixture of experts, or one dense FFN.

Shape suffixes: B sequences, S positions, D model width.
"""

import torch
from torch import nn
from torch.nn import functional

from dsmoe_ray.model.config import DenseFfnConfig, MoeConfig, RoutingConfig
from dsmoe_ray.model.dispatch import LOCAL_EXCHANGE, TokenExchange
from dsmoe_ray.model.experts import Experts
from dsmoe_ray.model.layer_routing import DENSE
from dsmoe_ray.model.router import Router, Routing


class MixtureOfExperts(nn.Module):
    """FFN experts of one layer and their router."""

    def __init__(self, config: MoeConfig, *, d_model: int) -> None:
        super().__init__()
        self.router = Router(config.router, num_experts=config.num_experts, d_model=d_model)
        self.experts = Experts(
            num_experts=config.num_experts, d_model=d_model, d_ff=config.d_ff, activation=config.activation
        )

    def forward(
        self, x_BSD: torch.Tensor, routing: RoutingConfig = DENSE, exchange: TokenExchange = LOCAL_EXCHANGE
    ) -> tuple[torch.Tensor, Routing]:
        """Return the gated sum of experts ``(B, S, D)`` and the routing."""
        x_TD = x_BSD.flatten(0, 1)
        decision = self.router(x_TD, routing)
        y_TD = self.experts(x_TD, decision.gates_TE, decision.selected_TE, exchange)
        return y_TD.view_as(x_BSD), decision


class DenseFfn(nn.Module):
    """One ordinary feed-forward network; ``w2`` is ``(d_ff, d_model)`` like an expert's."""

    def __init__(self, config: DenseFfnConfig, *, d_model: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(config.d_ff, d_model))
        self.w2 = nn.Parameter(torch.empty(config.d_ff, d_model))
        self.w3 = nn.Parameter(torch.empty(config.d_ff, d_model)) if config.activation == "swiglu" else None

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """Return ``(B, S, D)``."""
        up = functional.linear(x_BSD, self.w1.to(x_BSD.dtype))
        if self.w3 is None:
            hidden = functional.gelu(up)
        else:
            hidden = functional.silu(up) * functional.linear(x_BSD, self.w3.to(x_BSD.dtype))
        return hidden @ self.w2.to(x_BSD.dtype)
