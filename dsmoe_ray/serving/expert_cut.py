"""Cuts the tokens of one layer into a piece for each host that some of them need, and adds the answers up. Pure.

``compiled_cut.py`` does the same with the CPU kernels, in a tenth of the time.

Shape suffixes: T tokens of a call, E experts, K most experts that a token wants, P (token, expert) pairs, D model
width; with a small letter, those of one piece.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np


class CutTokens:
    """The tokens of a call; their memory may be filled anew for the next one."""

    __slots__ = ("addresses", "expert_ids_TK", "gates_TK", "x_TD")

    def __init__(self, x_TD: np.ndarray, expert_ids_TK: np.ndarray, gates_TK: np.ndarray) -> None:
        """Take arrays, all contiguous.

        Args:
            x_TD: Float32, or bfloat16 as uint16.
            expert_ids_TK: int32, ascending per token, then -1.
            gates_TK: float32.
        """
        self.x_TD, self.expert_ids_TK, self.gates_TK = x_TD, expert_ids_TK, gates_TK
        self.addresses = x_TD.ctypes.data, expert_ids_TK.ctypes.data, gates_TK.ctypes.data


class Piece(NamedTuple):
    """The part of a call that one host computes. Its arrays are valid until the next cut."""

    rows: np.ndarray
    """Ascending: which tokens of the call it is about."""
    x_tD: np.ndarray
    expert_ids_tK: np.ndarray
    """int32, as wide as the token that wants most here needs; ascending per token, then -1."""
    gates_tK: np.ndarray
    """float32; 0 where the id is -1."""
    num_pairs: int


class Cutter(Protocol):
    """Cuts and adds, for one thread."""

    def cut(self, tokens: CutTokens, piece_of_E: np.ndarray, numbers: range) -> list[Piece | None]:
        """Return each of the pieces ``numbers``, None for one that no token needs.

        Args:
            tokens: Of the call.
            piece_of_E: int32 ``(E + 1,)``: which piece an expert belongs to, negative for none; the last entry, which
                an id of -1 finds, is -1.
            numbers: The pieces wanted.
        """

    def add(
        self,
        y_TD: np.ndarray,
        tokens: CutTokens,
        piece_of_E: np.ndarray,
        answers: Mapping[int, np.ndarray],
        *,
        by_pair: bool,
    ) -> None:
        """Set ``y_TD``, float32, to the sum of all answers, each token's from zero in ascending order of expert ids.

        Args:
            y_TD: Contiguous.
            tokens: Of the call.
            piece_of_E: As for ``cut``.
            answers: By piece, all of one type: ``(t, D)`` sums in float32, or in bfloat16 as uint16.
            by_pair: They are float32 rows ``(p, D)`` instead, one for each pair, token by token in order of ids.
        """


class NumpyCutter:
    """Cuts and adds without compiled kernels."""

    def cut(self, tokens: CutTokens, piece_of_E: np.ndarray, numbers: range) -> list[Piece | None]:
        """See ``Cutter``."""
        piece_TK = piece_of_E[tokens.expert_ids_TK]
        return [_cut_piece(tokens, piece_TK == number) for number in numbers]

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
        y_TD[:] = 0.0
        if not answers:
            return
        place_TK = _find_places(piece_of_E[tokens.expert_ids_TK], list(answers), by_pair=by_pair)
        rows = np.concatenate(list(answers.values()))
        if rows.dtype == np.uint16:
            rows = (rows.astype(np.uint32) << 16).view(np.float32)
        for place_T in place_TK.T:
            wanted = np.flatnonzero(place_T >= 0)
            y_TD[wanted] += rows[place_T[wanted]]


def _cut_piece(tokens: CutTokens, mask_TK: np.ndarray) -> Piece | None:
    counts_T = np.count_nonzero(mask_TK, axis=1)
    rows = np.flatnonzero(counts_T)
    if not len(rows):
        return None
    counts_t = counts_T[rows]
    kept_tK = np.arange(counts_t.max()) < counts_t[:, None]
    ids_tK = np.full(kept_tK.shape, -1, np.int32)
    gates_tK = np.zeros(kept_tK.shape, np.float32)
    ids_tK[kept_tK] = tokens.expert_ids_TK[mask_TK]
    gates_tK[kept_tK] = tokens.gates_TK[mask_TK]
    return Piece(rows, tokens.x_TD[rows], ids_tK, gates_tK, int(counts_t.sum()))


def _find_places(piece_TK: np.ndarray, numbers: list[int], *, by_pair: bool) -> np.ndarray:
    """Return which row of all answers, one after another, each pair adds; -1 for none."""
    place_TK = np.full(piece_TK.shape, -1, np.int64)
    first = 0
    for number in numbers:
        mask_TK = piece_TK == number
        if not by_pair:
            # A token's sum counts once: where the first of the piece's experts is.
            mask_TK &= np.cumsum(mask_TK, axis=1) == 1
        count = int(np.count_nonzero(mask_TK))
        place_TK[mask_TK] = np.arange(first, first + count)
        first += count
    return place_TK
