"""Cutting the tokens of a call and adding the answers, with and without compiled kernels."""

import numpy as np
import pytest

from dsmoe_ray.serving.compiled_cut import CompiledCutter, build_cutter
from dsmoe_ray.serving.expert_cut import CutTokens, NumpyCutter
from tests.fakes.runner_kinds import with_kernels

NUM_EXPERTS, D_MODEL = 40, 24
CUTTERS = {
    "numpy": NumpyCutter,
    "native": lambda: with_kernels("cpu native", lambda: CompiledCutter(num_threads=1)),
    "portable, two threads": lambda: with_kernels("cpu portable", lambda: CompiledCutter(num_threads=2)),
}


@pytest.fixture(params=CUTTERS.values(), ids=CUTTERS)
def cutter(request):
    return request.param()


def make_tokens(num_tokens, *, width=6, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    ids_TK = np.full((num_tokens, width), -1, np.int32)
    gates_TK = np.zeros((num_tokens, width), np.float32)
    for token in range(num_tokens):
        count = generator.integers(0, width + 1)
        ids_TK[token, :count] = np.sort(generator.choice(NUM_EXPERTS, count, replace=False))
        gates_TK[token, :count] = generator.random(count)
    x_TD = generator.integers(0, 1 << 16, (num_tokens, D_MODEL)).astype(dtype)
    return CutTokens(x_TD, ids_TK, gates_TK)


def deal_experts(num_pieces, *, seed=0):
    piece_of_E = np.full(NUM_EXPERTS + 1, -1, np.int32)
    piece_of_E[:-1] = np.random.default_rng(seed).integers(0, num_pieces, NUM_EXPERTS)
    return piece_of_E


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
@pytest.mark.parametrize(("num_tokens", "num_pieces"), [(1, 1), (7, 3), (70, 33)])
def test_pieces_hold_each_token_once_with_the_experts_that_belong_there(cutter, num_tokens, num_pieces, dtype):
    tokens, piece_of_E = make_tokens(num_tokens, dtype=dtype), deal_experts(num_pieces)
    numbers = range(1, num_pieces) if num_pieces > 1 else range(num_pieces)
    pieces = cutter.cut(tokens, piece_of_E, numbers)
    assert len(pieces) == len(numbers)
    for number, piece in zip(numbers, pieces, strict=True):
        wanted = [[e for e in ids if e >= 0 and piece_of_E[e] == number] for ids in tokens.expert_ids_TK.tolist()]
        rows = [row for row, ids in enumerate(wanted) if ids]
        if piece is None:
            assert not rows
            continue
        assert piece.rows.tolist() == rows and piece.num_pairs == sum(map(len, wanted))
        assert np.array_equal(piece.x_tD, tokens.x_TD[rows]) and piece.x_tD.dtype == dtype
        width = max(map(len, wanted))
        assert piece.expert_ids_tK.tolist() == [wanted[row] + [-1] * (width - len(wanted[row])) for row in rows]
        for row, ids_K, gates_K in zip(rows, piece.expert_ids_tK, piece.gates_tK, strict=True):
            gate_of = dict(zip(tokens.expert_ids_TK[row].tolist(), tokens.gates_TK[row].tolist(), strict=True))
            assert gates_K.tolist() == [gate_of[e] if e >= 0 else 0.0 for e in ids_K.tolist()]
        assert all(array.flags.c_contiguous for array in piece[1:4])


def make_answers(tokens, piece_of_E, num_pieces, *, by_pair, dtype=np.float32, seed=1):
    generator = np.random.default_rng(seed)
    answers = {}
    for number, piece in enumerate(NumpyCutter().cut(tokens, piece_of_E, range(num_pieces))):
        if piece is not None:
            shape = (piece.num_pairs if by_pair else len(piece.rows), D_MODEL)
            rows = generator.standard_normal(shape).astype(np.float32)
            answers[number] = rows if dtype == np.float32 else (rows.view(np.uint32) >> 16).astype(np.uint16)
    return answers


@pytest.mark.parametrize("num_tokens", [1, 9, 100])
def test_rows_are_added_one_after_another_in_ascending_order_of_experts(cutter, num_tokens):
    tokens, piece_of_E = make_tokens(num_tokens), deal_experts(5)
    answers = make_answers(tokens, piece_of_E, 5, by_pair=True)
    y_TD = np.full((num_tokens, D_MODEL), np.nan, np.float32)
    cutter.add(y_TD, tokens, piece_of_E, answers, by_pair=True)
    left = {number: iter(rows) for number, rows in answers.items()}
    for token, ids in enumerate(tokens.expert_ids_TK.tolist()):
        expected = np.zeros(D_MODEL, np.float32)
        for expert_id in ids:
            if expert_id >= 0:
                expected += next(left[int(piece_of_E[expert_id])])
        assert np.array_equal(y_TD[token], expected)


@pytest.mark.parametrize("dtype", [np.float32, np.uint16], ids=["float32", "bfloat16"])
def test_sums_of_pieces_are_added_in_the_order_of_their_first_experts(cutter, dtype):
    tokens, piece_of_E = make_tokens(30), deal_experts(4)
    answers = make_answers(tokens, piece_of_E, 4, by_pair=False, dtype=dtype)
    y_TD = np.full((30, D_MODEL), np.nan, np.float32)
    cutter.add(y_TD, tokens, piece_of_E, answers, by_pair=False)
    left = {number: iter(rows) for number, rows in answers.items()}
    for token, ids in enumerate(tokens.expert_ids_TK.tolist()):
        expected = np.zeros(D_MODEL, np.float32)
        for number in dict.fromkeys(int(piece_of_E[expert_id]) for expert_id in ids if expert_id >= 0):
            row = next(left[number])
            expected += row if dtype == np.float32 else (row.astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(y_TD[token], expected)


def test_tokens_that_want_nobody_get_zeros(cutter):
    tokens = CutTokens(np.ones((3, D_MODEL), np.float32), np.full((3, 2), -1, np.int32), np.zeros((3, 2), np.float32))
    assert cutter.cut(tokens, deal_experts(2), range(2)) == [None, None]
    y_TD = np.full((3, D_MODEL), np.nan, np.float32)
    cutter.add(y_TD, tokens, deal_experts(2), {}, by_pair=True)
    assert (y_TD == 0.0).all()


def test_without_kernels_numpy_cuts(monkeypatch):
    monkeypatch.setenv("DSMOE_CPU_KERNELS", "off")
    assert isinstance(build_cutter(num_threads=1), NumpyCutter)
