"""The three ways to run sparse experts against one expert after another on all tokens."""

import pytest
import torch

from dsmoe_ray.inference.row_math import ExactMath, FastMath
from dsmoe_ray.inference.sparse_experts import LocalExperts, experts_of, run_by_expert, run_grouped, run_wide
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.dispatch import ExpertAssignment
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.numerics.references import sum_of_experts

# Float32 sums of some ten terms of size one, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
NUM_EXPERTS = 6


@pytest.fixture(params=["gelu", "swiglu"])
def model(request):
    config = ModelConfig.model_validate(
        {
            "vocab_size": 20,
            "d_model": 16,
            "num_layers": 2,
            "max_seq_len": 8,
            "attention": {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
            "ffn": {"kind": "moe", "num_experts": NUM_EXPERTS, "d_ff": 8, "activation": request.param},
            "init_std": 0.5,
        }
    )
    made = Transformer(config)
    initialize(made, config, seed=0)
    return made.requires_grad_(False)


def random_assignment(num_tokens, *, most=3, fewest=0):
    """Tokens that want between ``fewest`` and ``most`` experts; expert 4 is wanted by none."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids_TK = torch.full((num_tokens, most), -1, dtype=torch.int32)
    gates_TK = torch.zeros(num_tokens, most)
    for token in range(num_tokens):
        count = int(torch.randint(fewest, most + 1, (), generator=generator))
        ids = torch.tensor([0, 1, 2, 3, 5])[torch.randperm(5, generator=generator)[:count]].sort().values
        ids_TK[token, :count] = ids.int()
        gates_TK[token, :count] = torch.rand(count, generator=generator)
    return ExpertAssignment(ids_TK, gates_TK)


def expected_of(experts, x_TD, assignment):
    gates_TE = torch.zeros(len(x_TD), NUM_EXPERTS + 1)
    ids_TK = assignment.expert_ids_TK.long()
    gates_TE.scatter_(1, ids_TK.masked_fill(ids_TK < 0, NUM_EXPERTS), assignment.gates_TK)
    return sum_of_experts(experts, x_TD, gates_TE[:, :NUM_EXPERTS])


def tokens(num_tokens):
    return torch.randn(num_tokens, 16, generator=torch.Generator().manual_seed(7))


WAYS = {
    "by expert": lambda x, a, w: run_by_expert(x, a, w, FastMath()),
    "by expert, exact": lambda x, a, w: run_by_expert(x, a, w, ExactMath()),
    "grouped": lambda x, a, w: run_grouped(x, a, w, FastMath()),
    "wide": run_wide,
}


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_gives_the_gated_sum_of_the_experts_that_a_token_wants(model, way, num_tokens):
    experts = model.blocks[1].ffn.experts
    x_TD, assignment = tokens(num_tokens), random_assignment(num_tokens, fewest=1 if num_tokens == 1 else 0)
    found_TD = way(x_TD, assignment, experts_of(model)[1].to(torch.float32))
    torch.testing.assert_close(found_TD, expected_of(experts, x_TD, assignment), **CLOSE)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_tokens_that_want_no_expert_get_zeros(model, way):
    assignment = ExpertAssignment(torch.full((3, 2), -1, dtype=torch.int32), torch.zeros(3, 2))
    found_TD = way(tokens(3), assignment, experts_of(model)[0].to(torch.float32))
    assert (found_TD == 0.0).all()


@pytest.mark.parametrize("numerics", [FastMath(), ExactMath()], ids=["fast", "exact"])
def test_a_backend_runs_each_layers_own_experts(model, numerics):
    backend = LocalExperts(experts_of(model), numerics=numerics)
    x_TD, assignment = tokens(9), random_assignment(9)
    handles = [backend.dispatch(layer, x_TD, assignment) for layer in (0, 1)]
    for layer, handle in enumerate(handles):
        expected_TD = expected_of(model.blocks[layer].ffn.experts, x_TD, assignment)
        torch.testing.assert_close(backend.combine(handle), expected_TD, **CLOSE)


@pytest.mark.parametrize("numerics", [FastMath(), ExactMath()], ids=["fast", "exact"])
def test_a_token_that_wants_every_expert_gets_them_all(model, numerics):
    ids_TE = torch.arange(NUM_EXPERTS, dtype=torch.int32).expand(9, -1)
    assignment = ExpertAssignment(ids_TE, torch.rand(9, NUM_EXPERTS), all_experts=True)
    backend, x_TD = LocalExperts(experts_of(model), numerics=numerics), tokens(9)
    found_TD = backend.combine(backend.dispatch(0, x_TD, assignment))
    torch.testing.assert_close(found_TD, expected_of(model.blocks[0].ffn.experts, x_TD, assignment), **CLOSE)


def test_exact_outputs_of_a_token_do_not_depend_on_how_wide_the_assignment_is_or_who_else_is_there(model):
    backend = LocalExperts(experts_of(model), numerics=ExactMath())
    x_TD, assignment = tokens(9), random_assignment(9)
    whole_TD = backend.combine(backend.dispatch(0, x_TD, assignment))
    for token in range(9):
        ids_1K, gates_1K = (part[token : token + 1] for part in assignment[:2])
        count = max(int((ids_1K >= 0).sum()), 1)
        alone = ExpertAssignment(ids_1K[:, :count], gates_1K[:, :count])
        handle = backend.dispatch(0, x_TD[token : token + 1], alone)
        assert torch.equal(backend.combine(handle)[0], whole_TD[token])
