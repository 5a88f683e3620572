"""What the compiled experts are given; what they compute is in ``tests/contract/test_expert_backend.py``."""

import pytest
import torch

from dsmoe_ray.model.dispatch import ExpertAssignment
from tests.fakes.runner_kinds import MAX_TOKENS, make_experts, make_model

D_MODEL, NUM_EXPERTS = 24, 6


@pytest.fixture(scope="module")
def experts():
    return make_experts("cpu native", make_model(d_model=D_MODEL))


def make_inputs(num_tokens, width=4):
    x_TD = torch.randn(num_tokens, D_MODEL, generator=torch.Generator().manual_seed(0))
    ids_TK = torch.arange(width, dtype=torch.int32).repeat(num_tokens, 1)
    return x_TD, ids_TK, torch.full((num_tokens, width), 0.5)


def test_a_token_cut_out_of_a_wider_assignment_gets_its_experts_only(experts):
    x_TD, ids_TK, gates_TK = make_inputs(1)
    narrow = ids_TK[:, :2], gates_TK[:, :2]
    assert narrow[0].is_contiguous() and narrow[0].stride(0) == 4
    found = experts.dispatch(0, x_TD, ExpertAssignment(*narrow))
    assert torch.equal(found, experts.dispatch(0, x_TD, ExpertAssignment(*(part.clone() for part in narrow))))
    assert not torch.equal(found, experts.dispatch(0, x_TD, ExpertAssignment(ids_TK, gates_TK)))


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["cpu native", "torch exact"])
def test_rows_of_pairs_add_up_to_the_sums_of_tokens_bit_for_bit(kind, dtype, num_tokens):
    experts = make_experts(kind, make_model(d_model=D_MODEL, dtype=dtype))
    x_TD, ids_TK, gates_TK = make_inputs(num_tokens, NUM_EXPERTS)
    x_TD = x_TD.to(dtype)
    for token in range(num_tokens):
        ids_TK[token, token % NUM_EXPERTS :], gates_TK[token, token % NUM_EXPERTS :] = -1, 0.0
    assignment = ExpertAssignment(ids_TK, gates_TK * torch.rand(num_tokens, NUM_EXPERTS))
    rows = iter(experts.compute_pairs(1, x_TD, assignment))
    sums_TD = torch.zeros(num_tokens, D_MODEL)
    for token in range(num_tokens):
        for _ in range(token % NUM_EXPERTS):
            sums_TD[token] += next(rows)
    assert next(rows, None) is None
    expected_TD = experts.combine(experts.dispatch(1, x_TD, assignment))
    assert torch.equal(sums_TD.to(expected_TD.dtype), expected_TD)


WRONG = {
    "too many tokens": (lambda x, ids, gates: make_inputs(MAX_TOKENS + 1), f"{MAX_TOKENS + 1} tokens.*{MAX_TOKENS}"),
    "too wide": (lambda x, ids, gates: make_inputs(3, NUM_EXPERTS + 1), rf"\(3, 7\).*K up to {NUM_EXPERTS}"),
    "fewer ids than tokens": (lambda x, ids, gates: (x, ids[:2], gates[:2]), r"\(2, 4\).*\(3, K\)"),
    "fewer gates than ids": (lambda x, ids, gates: (x, ids, gates[:, :2].clone()), r"\(3, 4\) and gates \(3, 2\)"),
    "other width of tokens": (lambda x, ids, gates: (x[:, :8].clone(), ids, gates), r"\(3, 8\).*d_model=24"),
    "other type of tokens": (lambda x, ids, gates: (x.bfloat16(), ids, gates), "tokens are torch.bfloat16.*float32"),
    "other type of ids": (lambda x, ids, gates: (x, ids.long(), gates), "expert ids are torch.int64.*int32"),
    "other type of gates": (lambda x, ids, gates: (x, ids, gates.double()), "gates are torch.float64.*float32"),
    "ids with gaps": (lambda x, ids, gates: (x, ids[:, :2], gates[:, :2]), r"expert ids .* \(4, 1\).*contiguous"),
    "tokens in columns": (lambda x, ids, gates: (x.t().contiguous().t(), ids, gates), r"tokens .*\(1, 3\).*contiguous"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_inputs_that_the_kernels_would_misread_are_refused(experts, change, message):
    x_TD, ids_TK, gates_TK = change(*make_inputs(3))
    with pytest.raises(ValueError, match=message):
        experts.dispatch(0, x_TD, ExpertAssignment(ids_TK, gates_TK))
