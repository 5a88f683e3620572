"""Attention of query heads over shared key and value heads, its masks, the cache hook, and plain GQA.

Shape suffixes: B sequences, S new positions, C cached and new positions, D model width, H query heads, G KV heads,
d head_dim.
"""

from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional

from dsmoe_ray.model.config import GqaConfig
from dsmoe_ray.model.rope import Rotate


class KvCache(Protocol):
    """Keys and values of earlier positions."""

    @property
    def num_cached(self) -> int:
        """Positions held before this forward pass."""

    def append(self, layer: int, k_BSGd: torch.Tensor, v_BSGd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values of one layer; return all of them, ``(B, C, G, d)`` each."""


class AttentionContext(NamedTuple):
    """What all layers of one forward pass share."""

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor | None
    """Boolean, broadcastable to ``(B, H, S, C)``; None means plain causal."""
    cache: KvCache | None


def build_mask(
    num_new: int, num_cached: int, document_ids_BS: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """Return who may attend to whom, or None where the plain causal kernel says it.

    Args:
        num_new: Positions of this pass.
        num_cached: Positions before it.
        document_ids_BS: Positions attend within equal ids only; not together with a cache.
    """
    if document_ids_BS is None and (num_cached == 0 or num_new == 1):
        return None
    rows = torch.arange(num_cached, num_cached + num_new, device=device)
    causal_SC = rows[:, None] >= torch.arange(num_cached + num_new, device=device)
    if document_ids_BS is None:
        return causal_SC
    same_BSS = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
    return (same_BSS & causal_SC)[:, None]


def attend(q_BSHd: torch.Tensor, k_BCGd: torch.Tensor, v_BCGd: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return attention outputs ``(B, S, H, d)``; query head h reads KV head ``h // (H / G)``."""
    out = functional.scaled_dot_product_attention(
        q_BSHd.transpose(1, 2),
        k_BCGd.transpose(1, 2),
        v_BCGd.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None and q_BSHd.shape[1] > 1,
        enable_gqa=q_BSHd.shape[2] != k_BCGd.shape[2],
    )
    return out.transpose(1, 2)


def compute_kv(
    x_BSD: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor, *, num_kv_heads: int, layer: int, context: AttentionContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Project and rotate new keys and values and join them with cached ones, ``(B, C, G, d)`` each."""
    k_BSGd = functional.linear(x_BSD, wk.to(x_BSD.dtype)).unflatten(-1, (num_kv_heads, -1))
    v_BSGd = functional.linear(x_BSD, wv.to(x_BSD.dtype)).unflatten(-1, (num_kv_heads, -1))
    k_BSGd = Rotate.apply(k_BSGd, context.cos, context.sin)
    if context.cache is None:
        return k_BSGd, v_BSGd
    return context.cache.append(layer, k_BSGd, v_BSGd)


class GqaAttention(nn.Module):
    """Plain grouped-query attention."""

    def __init__(self, config: GqaConfig, *, d_model: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.wq = nn.Parameter(torch.empty(config.num_heads * config.head_dim, d_model))
        self.wk = nn.Parameter(torch.empty(config.num_kv_heads * config.head_dim, d_model))
        self.wv = nn.Parameter(torch.empty(config.num_kv_heads * config.head_dim, d_model))
        self.wo = nn.Parameter(torch.empty(config.num_heads * config.head_dim, d_model))

    def forward(self, x_BSD: torch.Tensor, context: AttentionContext) -> torch.Tensor:
        """Return ``(B, S, D)``."""
        q_BSHd = functional.linear(x_BSD, self.wq.to(x_BSD.dtype)).unflatten(-1, (self.config.num_heads, -1))
        k_BCGd, v_BCGd = compute_kv(
            x_BSD, self.wk, self.wv, num_kv_heads=self.config.num_kv_heads, layer=self.layer, context=context
        )
        out_BSHd = attend(Rotate.apply(q_BSHd, context.cos, context.sin), k_BCGd, v_BCGd, context.mask)
        return out_BSHd.flatten(2) @ self.wo.to(x_BSD.dtype)
