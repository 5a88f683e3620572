"""Weights as int8 with a float32 scale for each output, in the order in which ``cpu_kernels/int8.h`` reads them.

The matrices of attention, of the FFN experts and the output head are rounded: they are what decoding reads. Routers
stay in float32, as a slightly wrong score sends a token to another expert; the embedding is bfloat16, as a token reads
one row of it.

Shape suffixes: X matrices of one kind in a layer, N outputs, K inputs, V vocabulary, D model width, W heads together.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from dsmoe_ray.inference.sparse_experts import StackedWeights
from dsmoe_ray.model.transformer import Block, Transformer

INPUT_BLOCK = 32
"""Inputs that share a scale when they are rounded, ``kInputBlock`` of the kernels."""
OUTPUT_GROUP = 16
"""Outputs that lie together, ``kLanes`` of the kernels."""
_MAX_VALUE = 127


class Int8Matrices(NamedTuple):
    """Matrices of one shape, packed."""

    values: torch.Tensor
    """int8 ``(X, groups of outputs, blocks of inputs, 16 pairs of inputs, 16 outputs, 2)``."""
    scales: torch.Tensor
    """float32 ``(X, groups of outputs, 16)``."""


class Int8Experts(NamedTuple):
    """The FFN experts of one layer; ``w3`` for SwiGLU only."""

    w1: Int8Matrices
    w2: Int8Matrices
    w3: Int8Matrices | None
    shape: tuple[int, int, int]
    """Experts, width of one, model width."""


class Int8Trunk(NamedTuple):
    """One layer without its experts: attention, all heads or experts of it together, and hidden layers of routers."""

    wq: Int8Matrices
    wk: Int8Matrices
    wv: Int8Matrices
    wo: Int8Matrices
    attention_router_hidden: torch.Tensor | None
    """float32, where the router has one."""
    ffn_router_hidden: torch.Tensor | None


class Int8Model(NamedTuple):
    """What stands in for a model's own weights."""

    trunk: list[Int8Trunk]
    experts: list[Int8Experts]
    head: Int8Matrices
    embedding_VD: torch.Tensor
    """bfloat16."""


def pack_model(
    model: Transformer, layers: list[StackedWeights], *, after_layer: Callable[[], None] = lambda: None
) -> Int8Model:
    """Return a model's weights as int8, in memory of their own.

    Args:
        model: Its weights, of any floating type, are only read.
        layers: The FFN weights of each layer.
        after_layer: Called whenever a layer's own weights are not needed any more.
    """
    trunk, experts = [], []
    for block, ffn in zip(model.blocks, layers, strict=True):
        assert isinstance(block, Block)
        trunk.append(_pack_trunk(block))
        experts.append(pack_experts(ffn))
        after_layer()
    head = model.embedding if model.head is None else model.head
    packed = Int8Model(trunk, experts, pack(head.weight[None]), model.embedding.weight.to(torch.bfloat16))
    after_layer()
    return packed


def pack_experts(weights: StackedWeights) -> Int8Experts:
    """Return the experts of a layer as int8."""
    num_experts, d_ff, d_model = weights.w1_EFD.shape
    return Int8Experts(
        w1=pack(weights.w1_EFD),
        w2=pack(weights.w2_EFD.transpose(1, 2)),
        w3=None if weights.w3_EFD is None else pack(weights.w3_EFD),
        shape=(num_experts, d_ff, d_model),
    )


def _pack_trunk(block: Block) -> Int8Trunk:
    attention = block.attention
    wo_WD = attention.wo.flatten(0, -2)
    wq, wk, wv = (pack(matrix.flatten(0, -2)[None]) for matrix in (attention.wq, attention.wk, attention.wv))
    return Int8Trunk(
        wq=wq,
        wk=wk,
        wv=wv,
        wo=pack(wo_WD.t()[None]),
        attention_router_hidden=_widen_hidden(attention),
        ffn_router_hidden=_widen_hidden(block.ffn),
    )


def _widen_hidden(layer: nn.Module) -> torch.Tensor | None:
    router = getattr(layer, "router", None)
    return None if router is None or router.hidden is None else router.hidden.weight.float()


def pack(weights_XNK: torch.Tensor) -> Int8Matrices:
    """Round each output's weights to multiples of a 127th of the largest of them."""
    num_matrices, num_outputs, num_inputs = weights_XNK.shape
    groups, blocks = -(-num_outputs // OUTPUT_GROUP), -(-num_inputs // INPUT_BLOCK)
    pairs = INPUT_BLOCK // 2
    values = torch.empty(num_matrices, groups, blocks, pairs, OUTPUT_GROUP, 2, dtype=torch.int8)
    scales = torch.zeros(num_matrices, groups, OUTPUT_GROUP)
    # One after another, so that only one is there in float32.
    for index, weight_NK in enumerate(weights_XNK):
        scales_N = scales[index].view(groups * OUTPUT_GROUP)
        padded = torch.zeros(groups * OUTPUT_GROUP, blocks * INPUT_BLOCK)
        padded[:num_outputs, :num_inputs] = weight_NK
        torch.amax(padded.abs(), dim=1, out=scales_N)
        scales_N /= _MAX_VALUE
        # An output whose weights are all zero stays so.
        padded.div_(scales_N.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
        values[index] = padded.view(groups, OUTPUT_GROUP, blocks, pairs, 2).permute(0, 2, 3, 1, 4)
    return Int8Matrices(values, scales)
