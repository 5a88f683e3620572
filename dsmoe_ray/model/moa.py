"""Mixture of attention heads: every expert owns query and output projections; keys and values are shared.

Query head j of every expert reads KV head j. Run densely it is ordinary grouped-query attention whose groups of heads
are scaled by the gates before the output projection.

Shape suffixes: B sequences, S positions, T = B * S tokens, D model width, E experts, G KV heads (= heads per expert),
d head_dim.

Source: Pan et al., arXiv:2404.05567; Shen et al., "JetMoE", arXiv:2404.07413.
"""

import torch
from torch import nn
from torch.nn import functional

from dsmoe_ray.model.attention import AttentionContext, attend, compute_kv
from dsmoe_ray.model.config import MoaConfig, RoutingConfig
from dsmoe_ray.model.rope import Rotate
from dsmoe_ray.model.router import DENSE, Router, Routing


class MixtureOfAttention(nn.Module):
    """Attention experts of one layer and their router."""

    def __init__(self, config: MoaConfig, *, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width = config.num_kv_heads * config.head_dim
        self.router = Router(config.router, num_experts=config.num_experts, d_model=d_model)
        self.wq = nn.Parameter(torch.empty(config.num_experts, width, d_model))
        self.wk = nn.Parameter(torch.empty(width, d_model))
        self.wv = nn.Parameter(torch.empty(width, d_model))
        self.wo = nn.Parameter(torch.empty(config.num_experts, width, d_model))

    def forward(
        self, x_BSD: torch.Tensor, context: AttentionContext, routing: RoutingConfig = DENSE
    ) -> tuple[torch.Tensor, Routing]:
        """Return the gated sum of attention experts ``(B, S, D)`` and the routing.

        Unselected experts get a zero gate; they are computed all the same, since kernels for a ragged set of query
        heads are slower than dense ones at the share of experts that attention keeps.
        """
        batch, num_new, _ = x_BSD.shape
        num_experts, num_kv_heads = self.config.num_experts, self.config.num_kv_heads
        decision = self.router(x_BSD.flatten(0, 1), routing)
        q = functional.linear(x_BSD, self.wq.to(x_BSD.dtype).flatten(0, 1))
        # Heads go KV-head-major, so that the heads that read one KV head lie together.
        q_BSHd = q.view(batch, num_new, num_experts, num_kv_heads, -1).transpose(2, 3).flatten(2, 3)
        k_BCGd, v_BCGd = compute_kv(
            x_BSD, self.wk, self.wv, num_kv_heads=num_kv_heads, layer=self.layer, context=context
        )
        out_BSHd = attend(Rotate.apply(q_BSHd, context.cos, context.sin), k_BCGd, v_BCGd, context.mask)
        out_BSEGd = out_BSHd.unflatten(2, (num_kv_heads, num_experts)).transpose(2, 3)
        gates = decision.gates_TE.to(x_BSD.dtype).view(batch, num_new, num_experts, 1, 1)
        gated_BSW = (out_BSEGd * gates).flatten(2)
        return gated_BSW @ self.wo.to(x_BSD.dtype).flatten(0, 1), decision
