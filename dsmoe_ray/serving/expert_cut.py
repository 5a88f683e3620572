"""Cuts the tokens of one layer into a piece for each host that some of them need, and adds the answers up. Pure.

Shape suffixes: T tokens of a call, E experts, K most experts that a token wants, P (token, expert) pairs, D model
width; with a small letter, those of one piece.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """The part of an assignment that one host computes."""

    rows: np.ndarray
    """int64, ascending: which tokens of the call it is about."""
    expert_ids_TK: np.ndarray
    """int32, as wide as the token that wants most here needs; ascending per token, then -1."""
    gates_TK: np.ndarray
    """float32; 0 where the id is -1."""
    num_pairs: int


def cut_tokens(
    expert_ids_TK: np.ndarray, gates_TK: np.ndarray, piece_of_E: np.ndarray, pieces: range
) -> list[Piece | None]:
    """Return each of ``pieces``, None for one that no token needs.

    Args:
        expert_ids_TK: int32, ascending per token, then -1.
        gates_TK: float32.
        piece_of_E: int32 ``(E + 1,)``: which piece an expert belongs to, negative for none; the last entry, which an
            id of -1 finds, is -1.
        pieces: Those wanted.
    """
    piece_TK = piece_of_E[expert_ids_TK]
    return [_cut_piece(expert_ids_TK, gates_TK, piece_TK == piece) for piece in pieces]


def _cut_piece(expert_ids_TK: np.ndarray, gates_TK: np.ndarray, mask_TK: np.ndarray) -> Piece | None:
    counts_T = np.count_nonzero(mask_TK, axis=1)
    rows = np.flatnonzero(counts_T)
    if not len(rows):
        return None
    counts_t = counts_T[rows]
    kept_tk = np.arange(counts_t.max()) < counts_t[:, None]
    ids_tk = np.full(kept_tk.shape, -1, np.int32)
    gates_tk = np.zeros(kept_tk.shape, np.float32)
    ids_tk[kept_tk] = expert_ids_TK[mask_TK]
    gates_tk[kept_tk] = gates_TK[mask_TK]
    return Piece(rows, ids_tk, gates_tk, int(counts_t.sum()))


def add_rows(
    y_TD: np.ndarray, expert_ids_TK: np.ndarray, piece_of_E: np.ndarray, answers: Mapping[int, np.ndarray]
) -> None:
    """Set ``y_TD`` to the sums of gated rows, added in ascending order of expert ids from zero.

    Args:
        y_TD: Float32.
        expert_ids_TK: As for ``cut_tokens``.
        piece_of_E: As for ``cut_tokens``.
        answers: By piece, one float32 row ``(P, D)`` for each of its pairs, token by token in order of ids.
    """
    y_TD[:] = 0.0
    if not answers:
        return
    piece_TK = piece_of_E[expert_ids_TK]
    place_TK = np.full(expert_ids_TK.shape, -1, np.int64)
    first = 0
    for piece, y_PD in answers.items():
        place_TK[piece_TK == piece] = np.arange(first, first + len(y_PD))
        first += len(y_PD)
    y_PD = np.concatenate(list(answers.values()))
    for place_T in place_TK.T:
        rows = np.flatnonzero(place_T >= 0)
        y_TD[rows] += y_PD[place_T[rows]]


def add_sums(y_TD: np.ndarray, rows: Mapping[int, np.ndarray], answers: Mapping[int, np.ndarray]) -> None:
    """Set ``y_TD`` to the sum of what each piece says of its tokens: ``(t, D)``, float32, or bfloat16 as uint16."""
    y_TD[:] = 0.0
    for piece, y_tD in answers.items():
        y_TD[rows[piece]] += _widen(y_tD) if y_tD.dtype == np.uint16 else y_tD


def _widen(bfloat16: np.ndarray) -> np.ndarray:
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)
