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
_MAX_KNOWN = 1024


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
        self._known: dict[int, tuple[np.ndarray, int]] = {}
        self._grow(1 << 16)
        self._make_room(16)

    def cut(self, tokens: CutTokens, piece_of_E: np.ndarray, numbers: range) -> list[Piece | None]:
        """See ``Cutter``."""
        if len(numbers) > len(self._places):
            self._make_room(2 * len(numbers))
        x_TD = tokens.x_TD
        self._bind(tokens, piece_of_E, numbers)
        self._cut.row_bytes = x_TD.strides[0]
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
        cut = self._cut
        cut.num_tokens, cut.stride = tokens.expert_ids_TK.shape
        cut.x, cut.expert_ids, cut.gates = tokens.addresses
        cut.piece_of = self._find(piece_of_E)
        cut.first_piece, cut.num_pieces = numbers.start, len(numbers)

    def _find(self, piece_of_E: np.ndarray) -> int:
        """Return where an array lies; the same few come again and again."""
        known = self._known.get(id(piece_of_E))
        if known is None:
            if len(self._known) == _MAX_KNOWN:
                self._known.clear()
            # With the array itself, so that no other one gets its id.
            known = self._known[id(piece_of_E)] = piece_of_E, piece_of_E.ctypes.data
        return known[1]

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
