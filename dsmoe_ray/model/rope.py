"""Rotary positions: the first half of each head is the real part, the second half the imaginary part.

Shape suffixes: B batch, S positions, H heads, P half of head_dim.

Source: Su et al., "RoFormer", arXiv:2104.09864; the split into halves as in Llama checkpoints.
"""

from typing import Any

import torch


def compute_rotations(max_seq_len: int, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosine and sine for every position and frequency, float32 ``(max_seq_len, head_dim / 2)`` each."""
    frequency_P = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle_SP = torch.arange(max_seq_len, dtype=torch.float64)[:, None] * frequency_P
    return angle_SP.cos().float(), angle_SP.sin().float()


class Rotate(torch.autograd.Function):
    """Rotate queries or keys; the gradient is the inverse rotation, so nothing but the angles is kept."""

    @staticmethod
    def forward(ctx: Any, x_BSHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return ``x_BSHd`` rotated by angles that broadcast to ``(B, S, 1, P)``."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x_BSHd, cos, sin)

    @staticmethod
    def backward(ctx: Any, dy_BSHd: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Rotate the gradient back."""
        cos, sin = ctx.saved_tensors
        return _rotate(dy_BSHd, cos, -sin), None, None


def _rotate(x_BSHd: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    real, imaginary = x_BSHd.chunk(2, dim=-1)
    if torch.compiler.is_compiling():
        # The compiler fuses these by itself, and cannot follow writes into views of the output.
        return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1).to(x_BSHd.dtype)
    out_BSHd = torch.empty_like(x_BSHd)
    out_real, out_imaginary = out_BSHd.chunk(2, dim=-1)
    if x_BSHd.dtype == cos.dtype:
        torch.mul(real, cos, out=out_real).addcmul_(imaginary, sin, value=-1)
        torch.mul(imaginary, cos, out=out_imaginary).addcmul_(real, sin)
        return out_BSHd
    # Angles are float32; products are rounded to the compute type once, on the way into the output.
    out_real.copy_(real * cos - imaginary * sin)
    out_imaginary.copy_(imaginary * cos + real * sin)
    return out_BSHd
