"""FFN experts of all layers in this process, run sparsely: the local ``ExpertBackend``.

Three ways, by device and numerics. By expert: a loop over the experts that someone wants, each weight read once, no
copy of weights; on a CPU and for exact numerics. Grouped: all (token, expert) pairs sorted by expert go through one
grouped GEMM whose group sizes stay on the device; on a GPU that has it. Wide: all experts as one FFN, with gates of
zero for those not wanted; where every expert is wanted, and in a CUDA graph without grouped GEMM.

Shape suffixes: T tokens, D model width, E experts, F width of one expert, H = E * F, K most experts of a token,
P = T * K pairs of token and expert.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from dsmoe_ray.inference.row_math import ExactMath, RowMath
from dsmoe_ray.model.dispatch import ExpertAssignment, Ready
from dsmoe_ray.model.experts import WideWeights, dense_forward
from dsmoe_ray.model.moe import DenseFfn
from dsmoe_ray.model.transformer import Block, Transformer

# Compute capabilities for which torch 2.11 has a grouped GEMM that does not ask the device for group sizes.
_GROUPED_CAPABILITIES = (9, 10)
_GROUPED_ALIGNMENT = 8


class StackedWeights(NamedTuple):
    """All experts of one layer in the compute type, one after another; ``w3`` for SwiGLU only. All ``(E, F, D)``."""

    w1_EFD: torch.Tensor
    w2_EFD: torch.Tensor
    w3_EFD: torch.Tensor | None

    def to(self, dtype: torch.dtype) -> "StackedWeights":
        """Return them in a type, in place if they have it."""
        w3 = None if self.w3_EFD is None else self.w3_EFD.to(dtype)
        return StackedWeights(self.w1_EFD.to(dtype), self.w2_EFD.to(dtype), w3)


class LocalExperts:
    """All experts of a model, here."""

    def __init__(self, layers: Sequence[StackedWeights], *, numerics: RowMath, static_shapes: bool = False) -> None:
        """Use the weights in place.

        Args:
            layers: The experts of each layer.
            numerics: The kind of mathematics.
            static_shapes: Ask the device nothing and let no shape depend on values, as a CUDA graph needs it.
        """
        self.math, self.static_shapes, self._layers = numerics, static_shapes, layers

    def dispatch(self, layer: int, x_TD: torch.Tensor, assignment: ExpertAssignment) -> Ready[torch.Tensor]:
        """Run the experts."""
        weights = self._layers[layer].to(x_TD.dtype)
        if isinstance(self.math, ExactMath):
            return Ready(run_by_expert(x_TD, assignment, weights, self.math))
        if assignment.all_experts:
            return Ready(run_wide(x_TD, assignment, weights))
        if has_grouped_gemm(x_TD, weights):
            return Ready(run_grouped(x_TD, assignment, weights, self.math))
        if self.static_shapes:
            return Ready(run_wide(x_TD, assignment, weights))
        return Ready(run_by_expert(x_TD, assignment, weights, self.math))

    def combine(self, handle: Ready[torch.Tensor]) -> torch.Tensor:
        """Return the gated sums."""
        return handle.wait()

    def compute_pairs(self, layer: int, x_TD: torch.Tensor, assignment: ExpertAssignment) -> torch.Tensor:
        """Return what ``dispatch`` would add up, float32 ``(P, D)``: a row per pair, token after token."""
        ids_TK = assignment.expert_ids_TK
        token_ids, ks = torch.nonzero(ids_TK >= 0, as_tuple=True)
        pairs = ExpertAssignment(ids_TK[token_ids, ks][:, None], assignment.gates_TK[token_ids, ks][:, None])
        weights = self._layers[layer].to(x_TD.dtype)
        return sum_by_expert(x_TD.index_select(0, token_ids), pairs, weights, self.math)


def experts_of(model: Transformer) -> list[StackedWeights]:
    """Return the FFN weights of every layer of a model, where they lie; a dense FFN is one expert."""
    layers = []
    for block in model.blocks:
        assert isinstance(block, Block)
        ffn = block.ffn
        if isinstance(ffn, DenseFfn):
            layers.append(StackedWeights(ffn.w1[None], ffn.w2[None], None if ffn.w3 is None else ffn.w3[None]))
        else:
            layers.append(StackedWeights(ffn.experts.w1, ffn.experts.w2, ffn.experts.w3))
    return layers


def has_grouped_gemm(x_TD: torch.Tensor, weights: StackedWeights) -> bool:
    """Tell whether ``run_grouped`` runs here without waiting for the device."""
    if x_TD.device.type != "cuda" or torch.version.hip is not None or x_TD.dtype != torch.bfloat16:
        return False
    _, d_ff, d_model = weights.w1_EFD.shape
    aligned = d_ff % _GROUPED_ALIGNMENT == 0 and d_model % _GROUPED_ALIGNMENT == 0
    return aligned and torch.cuda.get_device_capability(x_TD.device)[0] in _GROUPED_CAPABILITIES


def run_by_expert(
    x_TD: torch.Tensor, assignment: ExpertAssignment, weights: StackedWeights, numerics: RowMath
) -> torch.Tensor:
    """Run each expert that someone wants once, on all of its tokens, and add outputs in ascending order of ids."""
    return sum_by_expert(x_TD, assignment, weights, numerics).to(x_TD.dtype)


def sum_by_expert(
    x_TD: torch.Tensor, assignment: ExpertAssignment, weights: StackedWeights, numerics: RowMath
) -> torch.Tensor:
    """Do so, and return the sums as they are added up, in float32."""
    num_experts = len(weights.w1_EFD)
    ids_TK = assignment.expert_ids_TK
    pairs = torch.nonzero(ids_TK.flatten() >= 0).flatten()
    expert_ids = ids_TK.flatten()[pairs].long()
    order = expert_ids.sort(stable=True).indices
    token_ids = pairs[order] // max(ids_TK.shape[1], 1)
    gates_P1 = assignment.gates_TK.flatten()[pairs[order], None]
    sizes = torch.bincount(expert_ids, minlength=num_experts).tolist()
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for expert_id, (tokens, gates) in enumerate(zip(token_ids.split(sizes), gates_P1.split(sizes), strict=True)):
        if len(tokens) == 0:
            continue
        x = x_TD.index_select(0, tokens)
        linear = None if weights.w3_EFD is None else numerics.linear(x, weights.w3_EFD[expert_id])
        hidden = numerics.activate(numerics.linear(x, weights.w1_EFD[expert_id]), linear)
        out = numerics.linear(hidden, weights.w2_EFD[expert_id].t())
        y_TD.index_add_(0, tokens, out.float() * gates)
    return y_TD


def run_grouped(
    x_TD: torch.Tensor, assignment: ExpertAssignment, weights: StackedWeights, numerics: RowMath
) -> torch.Tensor:
    """Run all pairs of token and expert through grouped GEMMs; nothing here depends on values, only on shapes."""
    num_experts = len(weights.w1_EFD)
    ids_TK = assignment.expert_ids_TK
    padding_TK = ids_TK < 0
    # Padding goes last, beyond the last group, where nothing is computed and memory is left as it was.
    sorted_P, order_P = ids_TK.masked_fill(padding_TK, num_experts).flatten().sort(stable=True)
    experts_E = torch.arange(num_experts, dtype=sorted_P.dtype, device=sorted_P.device)
    ends_E = torch.searchsorted(sorted_P, experts_E, right=True).int()
    x_PD = x_TD.index_select(0, order_P // ids_TK.shape[1])
    up_PF = functional.grouped_mm(x_PD, weights.w1_EFD.transpose(1, 2), offs=ends_E)
    linear_PF = None
    if weights.w3_EFD is not None:
        linear_PF = functional.grouped_mm(x_PD, weights.w3_EFD.transpose(1, 2), offs=ends_E)
    out_PD = functional.grouped_mm(numerics.activate(up_PF, linear_PF), weights.w2_EFD, offs=ends_E)
    places_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
    out_TKD = out_PD.index_select(0, places_P).view(*ids_TK.shape, x_TD.shape[1])
    weighed_TKD = (out_TKD * assignment.gates_TK[..., None]).masked_fill(padding_TK[..., None], 0.0)
    return weighed_TKD.sum(1).to(x_TD.dtype)


def run_wide(x_TD: torch.Tensor, assignment: ExpertAssignment, weights: StackedWeights) -> torch.Tensor:
    """Run every expert on every token as one wide FFN."""
    num_experts = len(weights.w1_EFD)
    gates_TE = assignment.gates_TK
    if not assignment.all_experts:
        # Padding has a gate of zero, and so may be added anywhere.
        gates_TE = gates_TE.new_zeros(len(x_TD), num_experts)
        gates_TE = gates_TE.scatter_add(1, assignment.expert_ids_TK.clamp_min(0).long(), assignment.gates_TK)
    w3_HD = None if weights.w3_EFD is None else weights.w3_EFD.flatten(0, 1)
    wide = WideWeights(weights.w1_EFD.flatten(0, 1), weights.w2_EFD.flatten(0, 1), w3_HD)
    return dense_forward(x_TD, gates_TE, wide)[0]
