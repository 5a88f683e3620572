"""Attention of query heads over shared key and value heads, its masks, and plain GQA.

Shape suffixes: B sequences, S positions, D model width, H query heads, G KV heads, d head_dim.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from dsmoe_ray.model.config import GqaConfig
from dsmoe_ray.model.rope import Rotate


class AttentionContext(NamedTuple):
    """What all layers of one forward pass share."""

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None
    """Boolean, broadcastable to ``(B, H, S, S)``; None means plain causal."""


def build_document_mask(document_ids_BS: torch.Tensor) -> torch.Tensor:
    """Return who may attend to whom if positions attend to earlier ones of equal ids only."""
    positions_S = torch.arange(document_ids_BS.shape[1], device=document_ids_BS.device)
    causal_SS = positions_S[:, None] >= positions_S
    same_BSS = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
    return (same_BSS & causal_SS)[:, None]


def attend(q_BSHd: torch.Tensor, k_BSGd: torch.Tensor, v_BSGd: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return attention outputs ``(B, S, H, d)``; query head h reads KV head ``h // (H / G)``."""
    out = functional.scaled_dot_product_attention(
        q_BSHd.transpose(1, 2),
        k_BSGd.transpose(1, 2),
        v_BSGd.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and q_BSHd.shape[1] > 1,
        enable_gqa=q_BSHd.shape[2] != k_BSGd.shape[2],
    )
    return out.transpose(1, 2)


def compute_kv(
    x_BSD: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor, *, num_kv_heads: int, context: AttentionContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys, rotated, and values, ``(B, S, G, d)`` each."""
    k_BSGd = functional.linear(x_BSD, wk.to(x_BSD.dtype)).unflatten(-1, (num_kv_heads, -1))
    v_BSGd = functional.linear(x_BSD, wv.to(x_BSD.dtype)).unflatten(-1, (num_kv_heads, -1))
    return Rotate.apply(k_BSGd, context.cos, context.sin), v_BSGd


class GqaAttention(nn.Module):
    """Plain grouped-query attention."""

    def __init__(self, config: GqaConfig, *, d_model: int) -> None:
        super().__init__()
        self.config = config
        self.wq = nn.Parameter(torch.empty(config.num_heads * config.head_dim, d_model))
        self.wk = nn.Parameter(torch.empty(config.num_kv_heads * config.head_dim, d_model))
        self.wv = nn.Parameter(torch.empty(config.num_kv_heads * config.head_dim, d_model))
        self.wo = nn.Parameter(torch.empty(config.num_heads * config.head_dim, d_model))

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Return ``(B, S, D)``."""
        q_BSHd = functional.linear(x_BSD, self.wq.to(x_BSD.dtype)).unflatten(-1, (self.config.num_heads, -1))
        k_BSGd, v_BSGd = compute_kv(x_BSD, self.wk, self.wv, num_kv_heads=self.config.num_kv_heads, context=context)
        out_BSHd = attend(Rotate.apply(q_BSHd, context.cos, context.sin), k_BSGd, v_BSGd, context.mask)
        return out_BSHd.flatten(2) @ self.wo.to(x_BSD.dtype)
