"""The cutting and adding of ``expert_cut.py`` by the compiled CPU kernels.

Shape suffixes as there.
"""

import ctypes
from collections.abc import Mapping
from ctypes import addressof, byref, c_void_p

import numpy as np

from dsmoe_ray.inference.cpu_library import KernelsUnavailableError, PieceCut, PiecePlace, load_kernels
from dsmoe_ray.serving.expert_cut import Cutter, CutTokens, NumpyCutter, Piece

_FLOAT32, _BFLOAT16 = 0, 1


def build_cutter(*, num_threads: int) -> Cutter:
    """Return the fastest one for this machine."""
    try:
        return CompiledCutter(num_threads=num_threads)
    except KernelsUnavailableError:
        return NumpyCutter()


class CompiledCutter:
    """Cuts and adds, with memory for pieces that is used again by the next cut."""

    def __init__(self, *, num_threads: int) -> None:
        """Load the kernels.

        Raises:
            KernelsUnavailableError: they cannot be built on this machine.
        """
        self._kernels = load_kernels()
        self._num_threads = num_threads
        self._cut = PieceCut()
        self._cut_ref = ctypes.cast(byref(self._cut), c_void_p)
        self._memory = bytearray()
        self._grow(1 << 16)
        self._make_room(16)

    def cut(self, tokens: CutTokens, piece_of_E: np.ndarray, numbers: range) -> list[Piece | None]:
        """See ``Cutter``."""
        if len(numbers) > len(self._places):
            self._make_room(2 * len(numbers))
        x_TD, cut = tokens.x_TD, self._cut
        self._bind(tokens, piece_of_E, numbers)
        cut.x, cut.gates, cut.row_bytes = x_TD.ctypes.data, tokens.gates_TK.ctypes.data, x_TD.strides[0]
        num_bytes = self._kernels.dsmoe_measure_pieces(self._cut_ref)
        if num_bytes > len(self._memory):
            self._grow(2 * num_bytes)
        self._kernels.dsmoe_cut_pieces(self._cut_ref)
        return [self._describe(x_TD, place) if place.num_rows else None for place in self._places[: len(numbers)]]

    def add(
        self,
        y_TD: np.ndarray,
        tokens: CutTokens,
        piece_of_E: np.ndarray,
        answers: Mapping[int, np.ndarray],
        *,
        by_pair: bool,
    ) -> None:
        """See ``Cutter``."""
        count = max(answers, default=-1) + 1
        if count > len(self._places):
            self._make_room(2 * count)
        dtype = _FLOAT32
        for number, answer in answers.items():
            self._answers[number] = answer.ctypes.data
            dtype = _BFLOAT16 if answer.dtype == np.uint16 else _FLOAT32
        self._bind(tokens, piece_of_E, range(count))
        self._kernels.dsmoe_add_pieces(
            self._cut_ref, self._answers, dtype, by_pair, y_TD.shape[1], self._num_threads, y_TD.ctypes.data
        )

    def _bind(self, tokens: CutTokens, piece_of_E: np.ndarray, numbers: range) -> None:
        ids_TK, cut = tokens.expert_ids_TK, self._cut
        cut.num_tokens, cut.stride = ids_TK.shape
        cut.expert_ids, cut.piece_of = ids_TK.ctypes.data, piece_of_E.ctypes.data
        cut.first_piece, cut.num_pieces = numbers.start, len(numbers)

    def _describe(self, x_TD: np.ndarray, place: PiecePlace) -> Piece:
        memory, count, width = self._memory, place.num_rows, place.width
        x_tD = x_TD if place.x < 0 else np.ndarray((count, x_TD.shape[1]), x_TD.dtype, memory, place.x)
        return Piece(
            np.ndarray(count, np.int32, memory, place.rows),
            x_tD,
            np.ndarray((count, width), np.int32, memory, place.ids),
            np.ndarray((count, width), np.float32, memory, place.gates),
            place.num_pairs,
        )

    def _grow(self, num_bytes: int) -> None:
        self._memory = bytearray(num_bytes)
        self._cut.memory = addressof(ctypes.c_char.from_buffer(self._memory))

    def _make_room(self, num_pieces: int) -> None:
        self._place_array = (PiecePlace * num_pieces)()
        self._places = list(self._place_array)
        self._cut.pieces = self._place_array
        self._answers = (c_void_p * num_pieces)()
