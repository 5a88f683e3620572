"""The FFN experts of one layer: their weights, the dense forward of all of them and the sparse forward of a few.

Dense: the gate multiplies the hidden activation before the down projection, which is the same as weighing the expert's
output. All experts together are then one ordinary wide FFN of width ``E * F``: one wide GEMM up, an element-wise gate,
one wide GEMM down. Only the pre-activation is kept for the backward pass; the gated activation is computed again there,
because an element-wise pass costs less than the memory it would hold.

Shape suffixes: T tokens owned here, N tokens seen here (all owners'), D model width, L experts held here, F width of
one expert, H = the experts of a wide FFN times F, K experts of a token.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dsmoe_ray.model.dispatch import LOCAL_EXCHANGE, TokenExchange

# For one token and experts up to this size, copying the selected weights together costs less than a loop over experts;
# larger ones are bound by reading weights, which a copy would triple.
_GATHERED_EXPERT_ELEMENTS = 1 << 16


class WideWeights(NamedTuple):
    """The experts held here as one wide FFN; ``w3`` for SwiGLU only. All ``(H, D)``."""

    w1_HD: torch.Tensor
    w2_HD: torch.Tensor
    w3_HD: torch.Tensor | None


class Experts(nn.Module):
    """Weights of the FFN experts of one layer.

    ``w1`` and ``w3`` project up and ``w2`` down, each ``(num_experts, d_ff, d_model)``, so that the experts of a layer
    lie one after another and the wide matrices are views. There are no biases.
    """

    def __init__(self, *, num_experts: int, d_model: int, d_ff: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        shape = (num_experts, d_ff, d_model)
        self.w1 = nn.Parameter(torch.empty(shape))
        self.w2 = nn.Parameter(torch.empty(shape))
        self.w3 = nn.Parameter(torch.empty(shape)) if activation == "swiglu" else None

    def forward(
        self,
        x_TD: torch.Tensor,
        gates_TE: torch.Tensor,
        selected_TE: torch.Tensor | None = None,
        exchange: TokenExchange = LOCAL_EXCHANGE,
    ) -> torch.Tensor:
        """Return the gated sum of expert outputs ``(T, D)``.

        Args:
            x_TD: Tokens owned here ``(T, D)``, float32 or bfloat16; weights are cast to this type.
            gates_TE: Float32 gates over all experts of the layer ``(T, E)``, zero where not selected.
            selected_TE: Which experts to run; None runs all of them on every token.
            exchange: Brings tokens to the experts held here and takes results back.
        """
        w1 = exchange.local_weight(self.w1).to(x_TD.dtype)
        w2 = exchange.local_weight(self.w2).to(x_TD.dtype)
        w3 = None if self.w3 is None else exchange.local_weight(self.w3).to(x_TD.dtype)
        if selected_TE is None:
            return DenseExperts.apply(x_TD, gates_TE, _wide(w1), _wide(w2), _wide(w3), exchange)

        def run(x_ND: torch.Tensor, gates_NL: torch.Tensor, selected_NL: torch.Tensor) -> torch.Tensor:
            return sparse_forward(x_ND, gates_NL, selected_NL, w1_LFD=w1, w2_LFD=w2, w3_LFD=w3)

        return exchange.run_sparse(x_TD, gates_TE, selected_TE, run)


def _wide(weight_LFD: torch.Tensor | None) -> torch.Tensor | None:
    return None if weight_LFD is None else weight_LFD.flatten(0, 1)


def sparse_forward(
    x_ND: torch.Tensor,
    gates_NL: torch.Tensor,
    selected_NL: torch.Tensor,
    *,
    w1_LFD: torch.Tensor,
    w2_LFD: torch.Tensor,
    w3_LFD: torch.Tensor | None,
) -> torch.Tensor:
    """Run only the selected experts and sum in expert order.

    Returns:
        ``(N, D)`` in the type of ``x_ND``; zeros for a token without a selected expert.
    """
    if len(x_ND) == 1 and w1_LFD[0].numel() <= _GATHERED_EXPERT_ELEMENTS:
        return _run_one_token(x_ND, gates_NL, selected_NL, w1_LFD=w1_LFD, w2_LFD=w2_LFD, w3_LFD=w3_LFD)
    return _run_by_expert(x_ND, gates_NL, selected_NL, w1_LFD=w1_LFD, w2_LFD=w2_LFD, w3_LFD=w3_LFD)


def _run_by_expert(
    x_ND: torch.Tensor,
    gates_NL: torch.Tensor,
    selected_NL: torch.Tensor,
    *,
    w1_LFD: torch.Tensor,
    w2_LFD: torch.Tensor,
    w3_LFD: torch.Tensor | None,
) -> torch.Tensor:
    """Run each selected expert once on all of its tokens."""
    y_ND = torch.zeros_like(x_ND)
    # unbind gives one gradient stack per weight; indexing each expert would fill a full-size zero gradient per expert.
    w1s, w2s = w1_LFD.unbind(0), w2_LFD.unbind(0)
    w3s = w3_LFD.unbind(0) if w3_LFD is not None else [None] * len(w1s)
    expert_idxs, token_ids = selected_NL.t().nonzero(as_tuple=True)
    num_tokens_per_expert = selected_NL.sum(0).tolist()
    gates = gates_NL[token_ids, expert_idxs].unsqueeze(-1).to(x_ND.dtype).split(num_tokens_per_expert)
    for expert_idx, tokens in enumerate(token_ids.split(num_tokens_per_expert)):
        if len(tokens) == 0:
            continue
        # Gathered expert by expert: one gather of all (token, expert) pairs would leave the processor's caches.
        x = x_ND.index_select(0, tokens)
        w3 = w3s[expert_idx]
        up = functional.linear(x, w1s[expert_idx])
        hidden = functional.gelu(up) if w3 is None else functional.silu(up) * functional.linear(x, w3)
        # In place: nothing in the backward pass reads the running sum.
        y_ND.index_add_(0, tokens, (hidden * gates[expert_idx]) @ w2s[expert_idx])
    return y_ND


def _run_one_token(
    x_1D: torch.Tensor,
    gates_1L: torch.Tensor,
    selected_1L: torch.Tensor,
    *,
    w1_LFD: torch.Tensor,
    w2_LFD: torch.Tensor,
    w3_LFD: torch.Tensor | None,
) -> torch.Tensor:
    """Run the experts of a single token as one FFN of their joint width, made of copies of their weights."""
    expert_idxs = selected_1L[0].nonzero().squeeze(-1)
    w1_HD, w2_HD = w1_LFD.index_select(0, expert_idxs).flatten(0, 1), w2_LFD.index_select(0, expert_idxs).flatten(0, 1)
    up_1H = functional.linear(x_1D, w1_HD)
    if w3_LFD is None:
        hidden_1H = functional.gelu(up_1H)
    else:
        w3_HD = w3_LFD.index_select(0, expert_idxs).flatten(0, 1)
        hidden_1H = functional.silu(up_1H) * functional.linear(x_1D, w3_HD)
    gates_1K1 = _broadcastable(gates_1L.index_select(1, expert_idxs), hidden_1H)
    gated_1KF = hidden_1H.view(1, len(expert_idxs), w1_LFD.shape[1]) * gates_1K1
    return gated_1KF.flatten(1) @ w2_HD


class DenseExperts(torch.autograd.Function):
    """Every expert held here on every owner's tokens, one chunk of tokens after another.

    While one chunk is computed, the next is gathered and the one before is reduced, forward and backward alike.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        gates_TE: torch.Tensor,
        w1_HD: torch.Tensor,
        w2_HD: torch.Tensor,
        w3_HD: torch.Tensor | None,
        exchange: TokenExchange,
    ) -> torch.Tensor:
        """Return ``(T, D)``: the sum over all experts of gate times output."""
        weights = WideWeights(w1_HD, w2_HD, w3_HD)
        chunks = list(zip(x_TD.chunk(exchange.num_chunks), gates_TE.chunk(exchange.num_chunks), strict=True))
        saved: list[torch.Tensor | None] = []
        outputs = []
        gathering = exchange.start_gather(*chunks[0])
        for index in range(len(chunks)):
            x_ND, gates_NL = gathering.wait()
            if index + 1 < len(chunks):
                gathering = exchange.start_gather(*chunks[index + 1])
            y_ND, up_NH, linear_NH = dense_forward(x_ND, gates_NL, weights)
            outputs.append(exchange.start_reduce(y_ND))
            saved += [x_ND, gates_NL, up_NH, linear_NH]
        ctx.exchange = exchange
        ctx.num_chunks = len(chunks)
        ctx.save_for_backward(w1_HD, w2_HD, w3_HD, *saved)
        return _concatenate([output.wait() for output in outputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return gradients of tokens ``(T, D)``, gates ``(T, E)`` and the weights held here ``(H, D)``."""
        w1_HD, w2_HD, w3_HD, *saved = ctx.saved_tensors
        weights = WideWeights(w1_HD, w2_HD, w3_HD)
        grads = WideWeights(
            torch.empty_like(w1_HD), torch.empty_like(w2_HD), None if w3_HD is None else torch.empty_like(w3_HD)
        )
        exchange = ctx.exchange
        chunks = dy_TD.chunk(ctx.num_chunks)
        results = []
        gathering = exchange.start_gather_grad(chunks[0])
        for index in range(len(chunks)):
            dy_ND = gathering.wait()
            if index + 1 < len(chunks):
                gathering = exchange.start_gather_grad(chunks[index + 1])
            x_ND, gates_NL, up_NH, linear_NH = saved[4 * index : 4 * index + 4]
            # The first chunk writes the gradient buffers, later ones add to them.
            beta = 0.0 if index == 0 else 1.0
            dx_ND, dgates_NL = dense_backward(
                dy_ND, x_ND, gates_NL, up_NH, linear_NH, weights=weights, grads=grads, beta=beta
            )
            results.append(exchange.start_reduce_grad(dx_ND, dgates_NL))
        dx, dgates = zip(*(result.wait() for result in results), strict=True)
        return _concatenate(list(dx)), _concatenate(list(dgates)), *grads, None


def dense_forward(
    x_ND: torch.Tensor, gates_NL: torch.Tensor, weights: WideWeights
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the wide FFN with gated hidden units.

    Returns:
        The output ``(N, D)`` and what the backward pass needs: the pre-activation and, for SwiGLU, the linear branch,
        ``(N, H)``.
    """
    up_NH = functional.linear(x_ND, weights.w1_HD)
    if weights.w3_HD is None:
        linear_NH = None
        hidden_NH = functional.gelu(up_NH)
    else:
        linear_NH = functional.linear(x_ND, weights.w3_HD)
        hidden_NH = functional.silu(up_NH).mul_(linear_NH)
    _by_expert(hidden_NH, gates_NL).mul_(_broadcastable(gates_NL, hidden_NH))
    return hidden_NH @ weights.w2_HD, up_NH, linear_NH


def dense_backward(
    dy_ND: torch.Tensor,
    x_ND: torch.Tensor,
    gates_NL: torch.Tensor,
    up_NH: torch.Tensor,
    linear_NH: torch.Tensor | None,
    *,
    weights: WideWeights,
    grads: WideWeights,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients of tokens ``(N, D)`` and gates ``(N, L)``; weight gradients become ``beta * grads + new``."""
    gates = _broadcastable(gates_NL, up_NH)
    activated_NH = functional.gelu(up_NH) if linear_NH is None else functional.silu(up_NH)
    hidden_NH = activated_NH if linear_NH is None else activated_NH * linear_NH
    dgated_NH = dy_ND @ weights.w2_HD.t()
    dgates_NL = _expert_dot(dgated_NH, hidden_NH, gates_NL)
    _by_expert(hidden_NH, gates_NL).mul_(gates)
    grads.w2_HD.addmm_(hidden_NH.t(), dy_ND, beta=beta)
    # From here on dgated_NH is the gradient of the ungated hidden activation.
    _by_expert(dgated_NH, gates_NL).mul_(gates)
    if linear_NH is None:
        dup_NH = torch.ops.aten.gelu_backward.grad_input(dgated_NH, up_NH, grad_input=dgated_NH)
        dx_ND = dup_NH @ weights.w1_HD
    else:
        assert weights.w3_HD is not None and grads.w3_HD is not None
        dlinear_NH = activated_NH.mul_(dgated_NH)
        grads.w3_HD.addmm_(dlinear_NH.t(), x_ND, beta=beta)
        dx_ND = dlinear_NH @ weights.w3_HD
        dup_NH = dgated_NH.mul_(linear_NH)
        torch.ops.aten.silu_backward.grad_input(dup_NH, up_NH, grad_input=dup_NH)
        dx_ND.addmm_(dup_NH, weights.w1_HD)
    grads.w1_HD.addmm_(dup_NH.t(), x_ND, beta=beta)
    return dx_ND, dgates_NL


def _by_expert(hidden_NH: torch.Tensor, gates_NL: torch.Tensor) -> torch.Tensor:
    num_tokens, num_experts = gates_NL.shape
    return hidden_NH.view(num_tokens, num_experts, hidden_NH.shape[1] // num_experts)


def _broadcastable(gates_NL: torch.Tensor, hidden_NH: torch.Tensor) -> torch.Tensor:
    return gates_NL.to(hidden_NH.dtype).unsqueeze(-1)


def _expert_dot(a_NH: torch.Tensor, b_NH: torch.Tensor, gates_NL: torch.Tensor) -> torch.Tensor:
    """Return each expert's dot product of two hidden tensors ``(N, L)``, in the gates' type."""
    a_NLF, b_NLF = _by_expert(a_NH, gates_NL), _by_expert(b_NH, gates_NL)
    if a_NH.device.type == "cpu" and a_NH.dtype != torch.bfloat16:
        # A batched row-by-column product never writes the element-wise one to memory. In bfloat16 it is far slower.
        return (a_NLF.unsqueeze(-2) @ b_NLF.unsqueeze(-1)).flatten(1).to(gates_NL.dtype)
    return (a_NLF * b_NLF).sum(-1, dtype=gates_NL.dtype)


def _concatenate(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
