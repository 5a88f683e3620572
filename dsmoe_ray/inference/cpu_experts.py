"""FFN experts in this process, on compiled CPU kernels: the ``ExpertBackend`` of a model that lives on one machine.

The tokens of a call are grouped by expert, and each expert's weights are read once, where they lie, whatever the batch.

Shape suffixes: T tokens of a call, D model width, E experts, F width of one expert, K experts that a token names, P
pairs of a token and an expert that it names.
"""

from collections.abc import Sequence

import numpy as np
import torch

from dsmoe_ray.inference.cpu_library import (
    ACTIVATIONS,
    DTYPES,
    MAX_STREAMED,
    ExpertCall,
    ExpertWeights,
    count_partial,
    load_kernels,
    point,
    reference,
)
from dsmoe_ray.inference.int8_weights import INPUT_BLOCK, Int8Experts
from dsmoe_ray.inference.sparse_experts import StackedWeights
from dsmoe_ray.model.dispatch import ExpertAssignment


class CpuExperts:
    """The FFN of every layer; a dense FFN is one expert that every token uses. For one call at a time."""

    def __init__(
        self, layers: Sequence[StackedWeights] | Sequence[Int8Experts], *, max_tokens: int, num_threads: int
    ) -> None:
        """Take the weights of equal layers where they lie, for calls of up to ``max_tokens`` tokens.

        Of experts that no call names nothing is read. Those of int8 take tokens in float32, others in their own type.
        """
        self._kernels = load_kernels()
        self._layers, first = layers, layers[0]
        shape: Sequence[int]
        if isinstance(first, Int8Experts):
            self._dtype, hidden_dtype, shape = torch.float32, torch.int16, first.shape
        else:
            self._dtype = hidden_dtype = first.w1_EFD.dtype
            shape = first.w1_EFD.shape
        num_experts, d_ff, d_model = shape
        x_blocks, hidden_blocks = (
            -(-size // INPUT_BLOCK) if isinstance(first, Int8Experts) else 0 for size in (d_model, d_ff)
        )
        self._d_model, self._max_tokens, self._num_experts = d_model, max_tokens, num_experts
        described = [_describe(layer, num_threads) for layer in layers]
        self._weights = (ExpertWeights * len(described))(*described)
        self._weight_refs = [reference(weights) for weights in self._weights]
        # Memory that is not written is not taken: this is the most that a call of all tokens to all experts can want.
        num_pairs = max_tokens * num_experts
        self._scratch = {
            "hidden": torch.empty(num_pairs, hidden_blocks * INPUT_BLOCK or d_ff, dtype=hidden_dtype),
            "hidden_scales": torch.empty(num_pairs, hidden_blocks),
            "rounded": torch.empty(max_tokens, x_blocks * INPUT_BLOCK, dtype=torch.int16),
            "rounded_scales": torch.empty(max_tokens, x_blocks),
            "expert_starts": torch.empty(num_experts + 1, dtype=torch.int32),
            "pair_tokens": torch.empty(num_pairs, dtype=torch.int32),
            "pair_rows": torch.empty(num_pairs, dtype=torch.int32),
            "pair_gates": torch.empty(num_pairs),
            "active_experts": torch.empty(num_experts, dtype=torch.int32),
            "num_active": torch.empty(1, dtype=torch.int32),
            "partial_starts": torch.empty(num_experts, dtype=torch.int32),
            "partial": torch.empty(count_partial(num_experts * min(max_tokens, MAX_STREAMED), d_ff, d_model)),
        }
        self._call = ExpertCall(**{name: point(tensor) for name, tensor in self._scratch.items()})
        self._call_ref = reference(self._call)
        self.addresses = reference(self._weights), self._call_ref
        """Of the weights of all layers and of the call, as the kernels take them."""

    def watch_routing(self, total_s: np.ndarray) -> None:
        """Let the one number of ``total_s``, float64, grow by the time that grouping tokens by expert takes."""
        self._total_s = total_s
        self._call.routing_s = total_s.ctypes.data

    def bind(self, x_TD: torch.Tensor, assignment: ExpertAssignment, y_TD: torch.Tensor) -> None:
        """Let calls read and write these: for ``dispatch``, or for a runner that has the kernels run all layers.

        Raises:
            ValueError: they are not what the kernels, which read plain memory, take them for.
        """
        self._check(x_TD, assignment)
        call = self._call
        call.by_pair = False
        call.num_tokens, call.x, call.y = len(x_TD), x_TD.data_ptr(), y_TD.data_ptr()
        call.stride = assignment.expert_ids_TK.shape[1]
        call.expert_ids, call.gates = assignment.expert_ids_TK.data_ptr(), assignment.gates_TK.data_ptr()

    def _check(self, x_TD: torch.Tensor, assignment: ExpertAssignment) -> None:
        ids_TK, gates_TK = assignment.expert_ids_TK, assignment.gates_TK
        num_tokens = len(x_TD)
        if num_tokens > self._max_tokens:
            raise ValueError(f"a call has {num_tokens} tokens; these experts take up to max_tokens={self._max_tokens}")
        shape = ids_TK.shape
        if len(shape) != 2 or shape[0] != num_tokens or shape[1] > self._num_experts or gates_TK.shape != shape:
            raise ValueError(
                f"expert ids are {tuple(shape)} and gates {tuple(gates_TK.shape)}; for {num_tokens} tokens both must "
                f"be ({num_tokens}, K) with K up to {self._num_experts}"
            )
        if x_TD.shape != (num_tokens, self._d_model):
            raise ValueError(f"tokens are {tuple(x_TD.shape)}; their rows must have d_model={self._d_model} numbers")
        wanted = (
            ("tokens", x_TD, self._dtype),
            ("expert ids", ids_TK, torch.int32),
            ("gates", gates_TK, torch.float32),
        )
        for name, tensor, dtype in wanted:
            if tensor.dtype != dtype or not tensor.is_contiguous():
                raise ValueError(
                    f"{name} are {tensor.dtype} with strides {tensor.stride()}; they must be {dtype} and contiguous"
                )

    def dispatch(self, layer: int, x_TD: torch.Tensor, assignment: ExpertAssignment) -> torch.Tensor:
        """Compute at once; see ``ExpertBackend``."""
        y_TD = torch.empty(len(x_TD), self._d_model)
        self.bind(x_TD, assignment, y_TD)
        self._kernels.dsmoe_experts(self._weight_refs[layer], self._call_ref)
        return y_TD

    def combine(self, handle: torch.Tensor) -> torch.Tensor:
        """Return what was computed, float32 ``(T, D)``."""
        return handle

    def compute_pairs(self, layer: int, x_TD: torch.Tensor, assignment: ExpertAssignment) -> torch.Tensor:
        """Return what ``dispatch`` would add up, float32 ``(P, D)``: a row per pair, token after token.

        Added to zero in float32, in this order, the rows of a token give the bits of its row of ``dispatch``.
        """
        num_pairs = int((assignment.expert_ids_TK >= 0).sum())
        y_PD = torch.empty(num_pairs, self._d_model)
        self.bind(x_TD, assignment, y_PD)
        self._call.by_pair = True
        self._kernels.dsmoe_experts(self._weight_refs[layer], self._call_ref)
        return y_PD

    def compute_arrays(
        self, layer: int, x_TD: np.ndarray, ids_TK: np.ndarray, gates_TK: np.ndarray, *, by_pair: bool
    ) -> np.ndarray:
        """Return what ``compute_pairs`` (``by_pair``) or ``dispatch`` would, for tokens that came as bytes.

        Args:
            layer: Whose experts.
            x_TD: In the weights' type, bfloat16 as uint16; contiguous like all arrays.
            ids_TK: int32, of experts that there are or -1.
            gates_TK: float32.
            by_pair: Whether each pair has a row of its own.
        """
        num_tokens, width = ids_TK.shape
        assert num_tokens <= self._max_tokens and x_TD.itemsize == self._dtype.itemsize and ids_TK.itemsize == 4
        y_RD = np.empty((np.count_nonzero(ids_TK >= 0) if by_pair else num_tokens, self._d_model), np.float32)
        call = self._call
        call.by_pair, call.num_tokens, call.stride = by_pair, num_tokens, width
        call.x, call.y, call.expert_ids, call.gates = map(_address_of, (x_TD, y_RD, ids_TK, gates_TK))
        self._kernels.dsmoe_experts(self._weight_refs[layer], self._call_ref)
        return y_RD


def _address_of(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _describe(weights: StackedWeights | Int8Experts, num_threads: int) -> ExpertWeights:
    if isinstance(weights, Int8Experts):
        return _describe_int8(weights, num_threads)
    num_experts, d_ff, d_model = weights.w1_EFD.shape
    return ExpertWeights(
        dtype=DTYPES[weights.w1_EFD.dtype],
        d_model=d_model,
        d_ff=d_ff,
        num_experts=num_experts,
        activation=ACTIVATIONS["gelu" if weights.w3_EFD is None else "swiglu"],
        num_threads=num_threads,
        w1=point(weights.w1_EFD),
        w2=point(weights.w2_EFD),
        w3=None if weights.w3_EFD is None else point(weights.w3_EFD),
    )


def _describe_int8(weights: Int8Experts, num_threads: int) -> ExpertWeights:
    num_experts, d_ff, d_model = weights.shape
    matrices = {name: getattr(weights, name) for name in ("w1", "w2", "w3") if getattr(weights, name) is not None}
    return ExpertWeights(
        dtype=DTYPES[torch.int8],
        d_model=d_model,
        d_ff=d_ff,
        num_experts=num_experts,
        activation=ACTIVATIONS["gelu" if weights.w3 is None else "swiglu"],
        num_threads=num_threads,
        **{name: point(packed.values) for name, packed in matrices.items()},
        **{f"{name}_scales": point(packed.scales) for name, packed in matrices.items()},
    )
