"""Root-mean-square norm.

PyTorch fuses it on CUDA only. On a CPU its forward and backward are a dozen passes over the tensor, each into new
memory; training there runs the few passes below instead, which also keep only one number per row.

Shape suffixes: D the normed dimension; leading dimensions are not named.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class RmsNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d_model))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` with unit root mean square, scaled per channel, in the type of ``x``."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight_D = self.weight.to(dtype)
        # Inference keeps PyTorch's: there a row must come out the same in any batch. A compiler fuses it by itself.
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return RmsNormOnCpu.apply(x, weight_D, self.eps)
        return functional.rms_norm(x.to(dtype), self.weight.shape, weight_D, self.eps).to(x.dtype)


class RmsNormOnCpu(torch.autograd.Function):
    """The same with a backward pass that recomputes the normed tensor."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """Return the normed and scaled ``x`` in its type; ``weight_D`` is float32 or wider."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=weight_D.dtype)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, inverse_rms)
        return (x * inverse_rms).mul_(weight_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Return gradients of ``x`` and the weight."""
        x, weight_D, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        product = dy * normed
        dweight_D = product.flatten(0, -2).sum(0)
        # What a change of x does to the mean square: the part of the gradient along the normed row, taken out.
        along = (product @ weight_D).div_(-x.shape[-1]).unsqueeze(-1)
        dx = (dy * weight_D).addcmul_(normed, along).mul_(inverse_rms)
        return dx.to(x.dtype), dweight_D, None
