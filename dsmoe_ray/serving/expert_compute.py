"""Computes calls of routers on the experts that a pool has in memory, on compiled kernels or in PyTorch.

Calls of one layer and one kind are computed as one, so that each expert's weights are read once for all of them. With
exact numerics a row's bits do not depend on what it is computed together with.

Shape suffixes: T tokens, D model width, K experts that a token names, R rows of an answer.
"""

import logging
from collections.abc import Hashable, Sequence
from typing import Literal, Protocol

import numpy as np
import torch

from dsmoe_ray.inference.cpu_experts import CpuExperts
from dsmoe_ray.inference.cpu_library import KernelsUnavailableError
from dsmoe_ray.inference.row_math import ExactMath, FastMath
from dsmoe_ray.inference.sparse_experts import LocalExperts
from dsmoe_ray.model.dispatch import ExpertAssignment
from dsmoe_ray.serving.expert_memory import ExpertMemory
from dsmoe_ray.serving.wire.messages import ExpertCall

MAX_TOKENS = 1024
"""Most tokens that are computed at once."""

_logger = logging.getLogger(__name__)


class _Backend(Protocol):
    def compute_arrays(
        self, layer: int, x_TD: np.ndarray, ids_TK: np.ndarray, gates_TK: np.ndarray, *, by_pair: bool
    ) -> np.ndarray:
        """See ``CpuExperts.compute_arrays``."""


class ExpertCompute:
    """The mathematics of one host; for one thread at a time."""

    def __init__(self, memory: ExpertMemory, *, num_threads: int) -> None:
        """Compute with what is in ``memory``, where it lies."""
        self._memory = memory
        self._dtype: Literal["float32", "bfloat16"] = "float32"
        if memory.layers[0].w1_EFD.dtype == torch.bfloat16:
            self._dtype = "bfloat16"
        self._backend = _build_backend(memory, num_threads)

    def compute(self, calls: Sequence[ExpertCall]) -> list[np.ndarray]:
        """Return the answer of each call, float32 ``(R, D)``: a row per token, or per (token, expert) if exact.

        Args:
            calls: Checked, of equal ``compute_key``; all experts that they name are in memory.
        """
        if len(calls) == 1:
            call = calls[0]
            return [self._compute(call, call.x_TD, call.expert_ids_TK, call.gates_TK)]
        x_TD = np.concatenate([call.x_TD for call in calls])
        ids_TK = _join_padded([call.expert_ids_TK for call in calls], -1)
        gates_TK = _join_padded([call.gates_TK for call in calls], 0)
        y_RD = self._compute(calls[0], x_TD, ids_TK, gates_TK)
        return np.split(y_RD, np.cumsum([count_rows(call) for call in calls[:-1]]))

    def _compute(self, like: ExpertCall, x_TD: np.ndarray, ids_TK: np.ndarray, gates_TK: np.ndarray) -> np.ndarray:
        if like.dtype != self._dtype:
            x_TD = to_wire(from_wire(x_TD), self._dtype)
        layer, ids_TK = self._memory.locate(like.layer, ids_TK)
        if len(x_TD) <= MAX_TOKENS:
            return self._backend.compute_arrays(layer, x_TD, ids_TK, gates_TK, by_pair=like.exact)
        parts = [slice(start, start + MAX_TOKENS) for start in range(0, len(x_TD), MAX_TOKENS)]
        return np.concatenate(
            [
                self._backend.compute_arrays(layer, x_TD[part], ids_TK[part], gates_TK[part], by_pair=like.exact)
                for part in parts
            ]
        )


class _TorchBackend:
    """Experts in PyTorch: on a GPU, and where there is no compiler."""

    def __init__(self, memory: ExpertMemory) -> None:
        weights = memory.layers[0].w1_EFD
        self._dtype, self._device = weights.dtype, weights.device
        self._fast = LocalExperts(memory.layers, numerics=FastMath())
        is_cpu = self._device.type == "cpu"
        self._exact = LocalExperts(memory.layers, numerics=ExactMath()) if is_cpu else self._fast

    def compute_arrays(
        self, layer: int, x_TD: np.ndarray, ids_TK: np.ndarray, gates_TK: np.ndarray, *, by_pair: bool
    ) -> np.ndarray:
        """See ``CpuExperts.compute_arrays``."""
        tokens_TD = _to_torch(x_TD).to(self._device)
        assignment = ExpertAssignment(_to_torch(ids_TK).to(self._device), _to_torch(gates_TK).to(self._device))
        if by_pair:
            y_RD = self._exact.compute_pairs(layer, tokens_TD, assignment)
        else:
            y_RD = self._fast.combine(self._fast.dispatch(layer, tokens_TD, assignment)).float()
        return y_RD.cpu().numpy()


def compute_key(call: ExpertCall) -> Hashable:
    """Return what calls that are computed together have in common."""
    return call.layer, call.exact, call.dtype


def count_rows(call: ExpertCall) -> int:
    """Return how many rows the answer of a call has."""
    return int(np.count_nonzero(call.expert_ids_TK >= 0)) if call.exact else len(call.x_TD)


def to_wire(y_RD: np.ndarray, dtype: Literal["float32", "bfloat16"]) -> np.ndarray:
    """Return float32 numbers as they travel in a type."""
    return y_RD if dtype == "float32" else torch.from_numpy(y_RD).bfloat16().view(torch.uint16).numpy()


def from_wire(x_TD: np.ndarray) -> np.ndarray:
    """Return numbers that travelled as float32."""
    return _to_torch(x_TD).float().numpy()


def _build_backend(memory: ExpertMemory, num_threads: int) -> _Backend:
    if memory.layers[0].w1_EFD.device.type != "cpu":
        return _TorchBackend(memory)
    try:
        return CpuExperts(memory.layers, max_tokens=MAX_TOKENS, num_threads=num_threads)
    except KernelsUnavailableError as error:
        _logger.warning("experts run in PyTorch, which is several times slower: %s", error)
        return _TorchBackend(memory)


def _to_torch(array: np.ndarray) -> torch.Tensor:
    # PyTorch knows no memory that must not be written, and would warn.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def _join_padded(arrays_TK: Sequence[np.ndarray], filler: float) -> np.ndarray:
    width = max(array_TK.shape[1] for array_TK in arrays_TK)
    padded_TK = np.full((sum(map(len, arrays_TK)), width), filler, arrays_TK[0].dtype)
    first = 0
    for array_TK in arrays_TK:
        padded_TK[first : first + len(array_TK), : array_TK.shape[1]] = array_TK
        first += len(array_TK)
    return padded_TK
