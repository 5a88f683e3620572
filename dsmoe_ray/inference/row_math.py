"""The products and element-wise functions of a forward pass, in two kinds: fast, and exact.

Exact: what comes out for a row depends on nothing but that row. Libraries do not promise it. A GEMM picks its kernel,
and so the order of its sums, by the number of rows and of threads; measured with PyTorch 2.13 on MKL in float32, rows
of 1 to 3 differ from larger ones on one thread, rows of 5, 6, 7 and 9 too on two, where each thread gets so few. So
every GEMM of a weight has the same number of rows here, one tile, padded; which number does it is tried out, because
the rows of one tile must come out alike too. Element-wise functions with an exponential round differently in the last
few elements of a tensor, or of a thread's part of it, where a vector register is not full: they run on pieces of whole
registers, too short for a second thread. Single additions, products, quotients and square roots are rounded correctly
by any code. PyTorch's sums along a row (norms, softmax) take the same order for every row; a test holds it to that.

A different number of threads, library or machine is another "exact": its rows differ from these in the last bits.

Shape suffixes: T tokens, N columns out, K columns in, H heads, d head_dim, P half of head_dim.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional

from dsmoe_ray.errors import ConfigError

TILES = (16, 8, 32, 64, 4, 1)
"""Numbers of rows to try, best first; a tile of one row has no neighbours and always does."""
_PIECE = 1 << 14
# At least two of the widest registers of the narrowest type, the step of PyTorch's loops; divides _PIECE.
_REGISTERS = 128
_TRIED_OUTPUTS = 1 << 12


class RowMath(Protocol):
    """What a forward pass is made of."""

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T``, ``(T, N)``; the weight may be a transposed view."""

    def activate(self, up: torch.Tensor, linear: torch.Tensor | None) -> torch.Tensor:
        """Return GeLU, or SwiGLU where a linear branch is given."""

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x * sigmoid(x)``."""


class FastMath:
    """PyTorch's own."""

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T``."""
        return functional.linear(x_TK, weight_NK)

    def activate(self, up: torch.Tensor, linear: torch.Tensor | None) -> torch.Tensor:
        """Return GeLU, or SwiGLU where a linear branch is given."""
        return functional.gelu(up) if linear is None else functional.silu(up) * linear

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x * sigmoid(x)``."""
        return functional.silu(x)


class ExactMath:
    """The same, each row by itself; see the top of this file."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[object, ...], int] = {}

    def linear(self, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T``, computed tile by tile."""
        weight_KN = weight_NK.t()
        tile = self.find_tile(weight_KN)
        out_TN = x_TK.new_empty(-(-len(x_TK) // tile) * tile, weight_KN.shape[1])
        padded_TK = functional.pad(x_TK.contiguous(), (0, 0, 0, len(out_TN) - len(x_TK)))
        for start in range(0, len(out_TN), tile):
            torch.mm(padded_TK[start : start + tile], weight_KN, out=out_TN[start : start + tile])
        return out_TN[: len(x_TK)]

    def activate(self, up: torch.Tensor, linear: torch.Tensor | None) -> torch.Tensor:
        """Return GeLU, or SwiGLU where a linear branch is given."""
        return in_pieces(functional.gelu, up) if linear is None else self.silu(up) * linear

    def silu(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x * sigmoid(x)``."""
        return in_pieces(functional.silu, x)

    def find_tile(self, right: torch.Tensor) -> int:
        """Return how many rows to multiply with ``(K, N)`` at once so that none depends on its place among them."""
        # Numbers of our own where the weight's would be: NaN or zeros would tell nothing.
        probe = torch.empty_strided(right.shape, right.stride(), dtype=right.dtype)
        probe.copy_(torch.randn(right.shape, generator=torch.Generator().manual_seed(1)))
        return self._find_tile(lambda rows: rows @ probe, probe)

    def find_attention_tile(self, num_kv_heads: int, head_dim: int, window: int) -> int:
        """Return how many query rows of each KV head may meet a window of keys and values at once, likewise."""
        generator = torch.Generator().manual_seed(1)
        values_WGd = torch.randn(window, num_kv_heads, head_dim, generator=generator)
        k_GdW, v_GWd = values_WGd.permute(1, 2, 0), values_WGd.transpose(0, 1)
        return self._find_tile(lambda rows: (rows @ k_GdW) @ v_GWd, k_GdW)

    def _find_tile(self, multiply: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor) -> int:
        key = (right.shape, right.stride(), right.dtype, torch.get_num_threads())
        if key not in self._tiles:
            found = next((tile for tile in TILES if _rows_agree(multiply, right, tile)), None)
            if found is None:
                raise ConfigError(
                    f"numerics=exact is not possible: a product of {tuple(right.shape)} {right.dtype} of numbers of "
                    "size one is not finite on this machine. Set numerics to fast, or dtype to float32."
                )
            self._tiles[key] = found
        return self._tiles[key]


def in_pieces(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply an element-wise function so that each result depends on its own element only."""
    padded = functional.pad(x.flatten(), (0, -x.numel() % _REGISTERS))
    pieces = [function(piece) for piece in padded.split(_PIECE)]
    return torch.cat(pieces)[: x.numel()].view(x.shape)


def rotate_exact(x_THd: torch.Tensor, cos_T1P: torch.Tensor, sin_T1P: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys by their positions, with one rounding an operation: never a fused multiply-add."""
    real, imaginary = x_THd.to(cos_T1P.dtype).chunk(2, dim=-1)
    rotated = [real * cos_T1P - imaginary * sin_T1P, imaginary * cos_T1P + real * sin_T1P]
    return torch.cat(rotated, dim=-1).to(x_THd.dtype)


def _rows_agree(multiply: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, tile: int) -> bool:
    """Tell whether equal rows come out equal all over a tile, by so many sums that a difference would show."""
    generator = torch.Generator().manual_seed(0)
    *leading, width, num_columns = right.shape
    for _ in range(-(-_TRIED_OUTPUTS // num_columns)):
        row = torch.randn(*leading, 1, width, generator=generator).to(right.dtype)
        product = multiply(row.expand(*leading, tile, width).contiguous())
        if not torch.equal(product, product[..., :1, :].expand_as(product)):
            return False
    return True
