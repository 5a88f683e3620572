"""Keys and values in blocks, and attention of new tokens over the blocks of their sequences.

Behind the blocks that the scheduler gives out lie two more slots. One stays zero and stands where a sequence has no
position, so that nothing left there by another sequence can reach this one, not even as a NaN times zero. The other
takes what the padding of a batch writes.

Query heads that read one KV head lie together, as rows of one matrix.

Shape suffixes: T tokens of the step, B sequences that decode, S new positions and C all positions of a sequence,
M blocks, N slots, G KV heads, Q query heads per KV head, R = S * Q query rows per KV head,
W positions of a window, d head_dim.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from dsmoe_ray.inference.row_math import ExactMath, in_pieces
from dsmoe_ray.model.config import ModelConfig

_NUM_SPARE_SLOTS = 2
WINDOW = 64
"""Positions that exact attention takes at a time."""


class PagedKvCache:
    """Memory for the keys and values of all layers, addressed by slot: block id times ``block_size`` plus offset."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        num_slots = num_blocks * block_size + _NUM_SPARE_SLOTS
        shape = (config.num_layers, num_slots, config.attention.num_kv_heads, config.attention.head_dim)
        self.k_LNGd = torch.zeros(shape, dtype=dtype, device=device)
        self.v_LNGd = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def zero_slot(self) -> int:
        """Return a slot that is zero and stays so."""
        return self.num_blocks * self.block_size

    @property
    def scratch_slot(self) -> int:
        """Return a slot that no sequence reads."""
        return self.zero_slot + 1

    @property
    def size_bytes(self) -> int:
        """Return the memory of the cache, filled or not."""
        return self.k_LNGd.nbytes + self.v_LNGd.nbytes

    def write(self, layer: int, slots_T: torch.Tensor, k_TGd: torch.Tensor, v_TGd: torch.Tensor) -> None:
        """Store keys and values of one layer."""
        self.k_LNGd[layer].index_copy_(0, slots_T, k_TGd)
        self.v_LNGd[layer].index_copy_(0, slots_T, v_TGd)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of keys and values, ``(*slots.shape, G, d)`` each."""
        flat = slots.flatten()
        k, v = self.k_LNGd[layer].index_select(0, flat), self.v_LNGd[layer].index_select(0, flat)
        return k.unflatten(0, slots.shape), v.unflatten(0, slots.shape)


def find_slots(
    cache: PagedKvCache, block_table: torch.Tensor, lengths: torch.Tensor, *, num_blocks: int
) -> torch.Tensor:
    """Return the slot of each position of sequences, the zero slot from their lengths on.

    Args:
        cache: Where the blocks are.
        block_table: Block ids ``(..., M)``.
        lengths: Positions of each sequence ``(...)``.
        num_blocks: Blocks to cover; the result is ``(..., num_blocks * block_size)``.
    """
    offsets = torch.arange(cache.block_size, device=block_table.device)
    slots = (block_table[..., :num_blocks, None] * cache.block_size + offsets).flatten(-2)
    positions = torch.arange(slots.shape[-1], device=slots.device)
    # Not torch.where, which would copy the number to the device, forbidden in a CUDA graph.
    return slots.masked_fill(positions >= lengths[..., None], cache.zero_slot)


@dataclass(frozen=True)
class DecodingRows:
    """Tokens that are each the newest of their sequence."""

    rows_B: torch.Tensor | None
    """Which tokens of the step; None for all, in order."""
    slots_BC: torch.Tensor
    mask_B11C: torch.Tensor
    """What to add to scores: minus infinity where a sequence has no position."""

    def attend(self, cache: PagedKvCache, layer: int, q_TGQd: torch.Tensor, out_TGQd: torch.Tensor) -> None:
        """Fill the rows of these tokens."""
        q_BGQd = q_TGQd if self.rows_B is None else q_TGQd.index_select(0, self.rows_B)
        k_BCGd, v_BCGd = cache.read(layer, self.slots_BC)
        found_BGQd = functional.scaled_dot_product_attention(
            q_BGQd, k_BCGd.transpose(1, 2), v_BCGd.transpose(1, 2), attn_mask=self.mask_B11C
        )
        if self.rows_B is None:
            out_TGQd.copy_(found_BGQd)
        else:
            out_TGQd.index_copy_(0, self.rows_B, found_BGQd)


@dataclass(frozen=True)
class ChunkRows:
    """Consecutive new tokens of one sequence."""

    rows: slice
    slots_C: torch.Tensor
    mask_SC: torch.Tensor | None
    """What to add to scores: minus infinity for later positions. None if these are the sequence's first tokens."""

    def attend(self, cache: PagedKvCache, layer: int, q_TGQd: torch.Tensor, out_TGQd: torch.Tensor) -> None:
        """Fill the rows of these tokens."""
        q_GQSd = q_TGQd[self.rows].permute(1, 2, 0, 3)
        # A KV head is seen by each of its query heads without a copy, and so is the mask.
        k_GQCd, v_GQCd = (
            tensor.transpose(0, 1)[:, None].expand(-1, q_GQSd.shape[1], -1, -1)
            for tensor in cache.read(layer, self.slots_C)
        )
        found_GQSd = functional.scaled_dot_product_attention(
            q_GQSd, k_GQCd, v_GQCd, attn_mask=self.mask_SC, is_causal=self.mask_SC is None
        )
        out_TGQd[self.rows] = found_GQSd.permute(2, 0, 1, 3)


@dataclass(frozen=True)
class ExactRows:
    """Consecutive new tokens of one sequence, attending so that a row depends on nothing but its context.

    Tiles of query rows meet windows of ``WINDOW`` positions in ascending order, each pair as a product of one fixed
    shape. Windows beyond a row's own position add exact zeros to it.
    """

    math: ExactMath
    rows: slice
    first_position: int
    slots_C: torch.Tensor
    """Padded with the zero slot to whole windows."""

    def attend(self, cache: PagedKvCache, layer: int, q_TGQd: torch.Tensor, out_TGQd: torch.Tensor) -> None:
        """Fill the rows of these tokens."""
        q_SGQd = q_TGQd[self.rows].float()
        num_new, num_kv_heads, num_query_heads, head_dim = q_SGQd.shape
        k_CGd, v_CGd = (tensor.float() for tensor in cache.read(layer, self.slots_C))
        k_windows = k_CGd.permute(1, 2, 0).split(WINDOW, dim=2)
        v_windows = v_CGd.transpose(0, 1).split(WINDOW, dim=1)
        tile = self.math.find_attention_tile(num_kv_heads, head_dim, WINDOW)
        num_rows = num_new * num_query_heads
        scaled_GRd = (q_SGQd / math.sqrt(head_dim)).transpose(0, 1).flatten(1, 2)
        padded_GRd = functional.pad(scaled_GRd, (0, 0, 0, -num_rows % tile))
        positions_R = torch.arange(padded_GRd.shape[1]) // num_query_heads + self.first_position
        tiles = [
            _attend_tile(q_GRd.contiguous(), positions, k_windows, v_windows)
            for q_GRd, positions in zip(padded_GRd.split(tile, dim=1), positions_R.split(tile), strict=True)
        ]
        found_GRd = torch.cat(tiles, dim=1)[:, :num_rows]
        out_TGQd[self.rows] = found_GRd.unflatten(1, (num_new, num_query_heads)).transpose(0, 1).to(out_TGQd.dtype)


def _attend_tile(
    q_GRd: torch.Tensor,
    positions_R: torch.Tensor,
    k_windows: Sequence[torch.Tensor],
    v_windows: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Return attention of a few query rows ``(G, R, d)`` over the windows ``(G, d, W)`` and ``(G, W, d)``."""
    scores = []
    for index in range(min(len(k_windows), int(positions_R[-1]) // WINDOW + 1)):
        ahead_RW = torch.arange(index * WINDOW, (index + 1) * WINDOW) > positions_R[:, None]
        scores.append((q_GRd @ k_windows[index]).masked_fill(ahead_RW, -math.inf))
    # A maximum is the same whatever the order.
    max_GR1 = torch.stack([score_GRW.amax(-1, keepdim=True) for score_GRW in scores]).amax(0)
    sum_GR1 = torch.zeros_like(max_GR1)
    out_GRd = torch.zeros_like(q_GRd)
    for score_GRW, v_GWd in zip(scores, v_windows, strict=False):
        weights_GRW = in_pieces(torch.exp, score_GRW - max_GR1)
        sum_GR1 += weights_GRW.sum(-1, keepdim=True)
        out_GRd += weights_GRW @ v_GWd
    return out_GRd / sum_GR1


def additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return zero where attention is allowed and minus infinity elsewhere: made once, not in every layer."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -math.inf)
