"""Mixture of attention heads: every expert owns query and output projections; keys and values are shared.

Query head j of every expert reads KV head j. Run densely it is ordinary grouped-query attention whose groups of heads
are scaled by the gates before the output projection.

Shape suffixes: B sequences, S positions, T = B * S tokens, D model width, E experts, G KV heads (= heads per expert),
d head_dim.

Source: Pan et al., arXiv:2404.05567; Shen et al., "JetMoE", arXiv:2404.07413.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dsmoe_ray.model.attention import AttentionContext, attend, compute_kv
from dsmoe_ray.model.config import MoaConfig, RoutingConfig
from dsmoe_ray.model.layer_routing import DENSE
from dsmoe_ray.model.rope import Rotate
from dsmoe_ray.model.router import Router, Routing


class MixtureOfAttention(nn.Module):
    """Attention experts of one layer and their router."""

    def __init__(self, config: MoaConfig, *, d_model: int) -> None:
        super().__init__()
        self.config = config
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
        batch, num_positions, _ = x_BSD.shape
        num_experts, num_kv_heads = self.config.num_experts, self.config.num_kv_heads
        decision = self.router(x_BSD.flatten(0, 1), routing)
        q = functional.linear(x_BSD, self.wq.to(x_BSD.dtype).flatten(0, 1))
        # Heads go KV-head-major, so that the heads that read one KV head lie together.
        q_BSHd = q.view(batch, num_positions, num_experts, num_kv_heads, -1).transpose(2, 3).flatten(2, 3)
        k_BSGd, v_BSGd = compute_kv(x_BSD, self.wk, self.wv, num_kv_heads=num_kv_heads, context=context)
        out_BSHd = attend(Rotate.apply(q_BSHd, context.cos, context.sin), k_BSGd, v_BSGd, context.mask)
        out_BSEGd = out_BSHd.unflatten(2, (num_kv_heads, num_experts)).transpose(2, 3)
        gated_BSW = gate_heads(out_BSEGd, decision.gates_TE.view(batch, num_positions, num_experts))
        return gated_BSW @ self.wo.to(x_BSD.dtype).flatten(0, 1), decision


def gate_heads(out_BSEGd: torch.Tensor, gates_BSE: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's heads by its gate and lay all heads side by side ``(B, S, E * G * d)``."""
    if torch.compiler.is_compiling():
        # The compiler fuses these by itself, and cannot follow a write into a tensor of another layout.
        return (out_BSEGd * _broadcastable(gates_BSE, out_BSEGd)).flatten(2)
    return GateHeads.apply(out_BSEGd, gates_BSE)


class GateHeads(torch.autograd.Function):
    """Do so in one pass: attention leaves heads in another order, so a product would be copied once more."""

    @staticmethod
    def forward(ctx: Any, out_BSEGd: torch.Tensor, gates_BSE: torch.Tensor) -> torch.Tensor:
        """Return ``(B, S, E * G * d)`` in the type of the heads."""
        ctx.save_for_backward(out_BSEGd, gates_BSE)
        gated_BSEGd = out_BSEGd.new_empty(out_BSEGd.shape)
        torch.mul(out_BSEGd, _broadcastable(gates_BSE, out_BSEGd), out=gated_BSEGd)
        return gated_BSEGd.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgated_BSW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return gradients of heads and gates."""
        out_BSEGd, gates_BSE = ctx.saved_tensors
        dgated_BSEGd = dgated_BSW.reshape(out_BSEGd.shape)
        dgates_BSE = (dgated_BSEGd * out_BSEGd).sum((-2, -1), dtype=gates_BSE.dtype)
        return dgated_BSEGd * _broadcastable(gates_BSE, out_BSEGd), dgates_BSE


def _broadcastable(gates_BSE: torch.Tensor, out_BSEGd: torch.Tensor) -> torch.Tensor:
    return gates_BSE.to(out_BSEGd.dtype)[..., None, None]
