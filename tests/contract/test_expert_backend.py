"""What every ``ExpertBackend`` keeps to, and what a runner makes of any of them."""

import contextlib
import tempfile
from pathlib import Path

import pytest
import torch

from dsmoe_ray.inference.cpu_experts import CpuExperts
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.row_math import ExactMath, FastMath
from dsmoe_ray.inference.sparse_experts import LocalExperts, experts_of
from dsmoe_ray.inference.torch_runner import TorchRunner
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.dispatch import ExpertAssignment
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.expert_fleet import ExpertFleet, publish
from tests.fakes.paged_sequences import PagedSequences
from tests.fakes.runner_kinds import with_kernels
from tests.numerics.references import sum_of_experts

# Float32 sums of some thirty terms of size one in another order; logits of size ten after two layers.
CLOSE = {"rtol": 1e-5, "atol": 3e-5}
NUM_EXPERTS, D_MODEL = 6, 32


REMOTE = [
    ("memory", 1, "exact"),
    ("unix", 2, "exact"),
    ("grpc", 4, "exact"),
    ("memory", 4, "fast"),
    ("unix", 2, "fast"),
    ("grpc", 1, "fast"),
]

_open = contextlib.ExitStack()


@pytest.fixture(autouse=True)
def _fleets_end_with_the_test():
    yield
    _open.close()


def build_remote(transport, num_hosts, *, exact):
    def build(model):
        directory = Path(_open.enter_context(tempfile.TemporaryDirectory()))
        artifact = publish(model, directory / "artifact")
        fleet = _open.enter_context(ExpertFleet(artifact, num_hosts=num_hosts, transport=transport))
        return fleet.client(exact=exact)

    return build


def build_compiled(model):
    return with_kernels("cpu native", lambda: CpuExperts(experts_of(model), max_tokens=64, num_threads=1))


BACKENDS = {
    "PyTorch, fast": lambda model: LocalExperts(experts_of(model), numerics=FastMath()),
    "PyTorch, static shapes": lambda model: LocalExperts(experts_of(model), numerics=FastMath(), static_shapes=True),
    "PyTorch, exact": lambda model: LocalExperts(experts_of(model), numerics=ExactMath()),
    "compiled": build_compiled,
    **{
        f"{num_hosts} hosts over {transport}, {numerics}": build_remote(transport, num_hosts, exact=numerics == "exact")
        for transport, num_hosts, numerics in REMOTE
    },
}
ALL = [
    pytest.param(build, id=name, marks=[pytest.mark.slow] if "over unix" in name or "over grpc" in name else [])
    for name, build in BACKENDS.items()
]
EXACT = [name for name in BACKENDS if name == "compiled" or name.endswith("exact")]


@pytest.fixture(params=["gelu", "swiglu"])
def model(request):
    config = ModelConfig.model_validate(
        {
            "vocab_size": 260,
            "d_model": D_MODEL,
            "num_layers": 2,
            "max_seq_len": 32,
            "attention": {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
            "ffn": {"kind": "moe", "num_experts": NUM_EXPERTS, "d_ff": 16, "activation": request.param},
            "init_std": 0.3,
        }
    )
    made = Transformer(config)
    initialize(made, config, seed=0)
    return made.requires_grad_(False)


def make_tokens(num_tokens):
    return torch.randn(num_tokens, D_MODEL, generator=torch.Generator().manual_seed(7))


def make_assignment(num_tokens, *, width=4):
    """Tokens that want none to ``width`` experts; expert 4 is wanted by none."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids_TK = torch.full((num_tokens, width), -1, dtype=torch.int32)
    gates_TK = torch.zeros(num_tokens, width)
    for token in range(num_tokens):
        count = token % (width + 1)
        ids = torch.tensor([0, 1, 2, 3, 5])[torch.randperm(5, generator=generator)[:count]].sort().values
        ids_TK[token, :count] = ids.int()
        gates_TK[token, :count] = torch.rand(count, generator=generator)
    return ExpertAssignment(ids_TK, gates_TK)


def expected_of(experts, x_TD, assignment):
    ids_TK = assignment.expert_ids_TK.long()
    gates_TE = torch.zeros(len(x_TD), NUM_EXPERTS + 1)
    gates_TE.scatter_(1, ids_TK.masked_fill(ids_TK < 0, NUM_EXPERTS), assignment.gates_TK)
    return sum_of_experts(experts, x_TD, gates_TE[:, :NUM_EXPERTS])


@pytest.mark.parametrize("build", ALL)
@pytest.mark.parametrize("num_tokens", [1, 6, 40])
def test_each_token_gets_the_gated_sum_of_the_experts_that_it_wants(model, build, num_tokens):
    backend, x_TD, assignment = build(model), make_tokens(num_tokens), make_assignment(num_tokens)
    for layer in (0, 1):
        found_TD = backend.combine(backend.dispatch(layer, x_TD, assignment))
        expected_TD = expected_of(model.blocks[layer].ffn.experts, x_TD, assignment)
        torch.testing.assert_close(found_TD, expected_TD, **CLOSE)
        assert (found_TD[0] == 0.0).all()


@pytest.mark.parametrize("name", EXACT)
def test_exact_outputs_of_a_token_do_not_depend_on_its_neighbours_or_on_the_width_of_the_assignment(model, name):
    backend, x_TD, assignment = BACKENDS[name](model), make_tokens(40), make_assignment(40)
    whole_TD = backend.combine(backend.dispatch(0, x_TD, assignment)).clone()
    for token in range(1, 40):
        count = max(token % 5, 1)
        alone = ExpertAssignment(
            assignment.expert_ids_TK[token : token + 1, :count].contiguous(),
            assignment.gates_TK[token : token + 1, :count].contiguous(),
        )
        found_1D = backend.combine(backend.dispatch(0, x_TD[token : token + 1].contiguous(), alone))
        assert torch.equal(found_1D[0], whole_TD[token])


@pytest.mark.parametrize("name", [name for name in EXACT if "hosts" in name])
def test_exact_outputs_of_experts_elsewhere_have_the_bits_of_experts_here(model, name):
    here, elsewhere = build_compiled(model), BACKENDS[name](model)
    for num_tokens in (1, 6, 40):
        x_TD, assignment = make_tokens(num_tokens), make_assignment(num_tokens)
        for layer in (0, 1):
            found_TD = elsewhere.combine(elsewhere.dispatch(layer, x_TD, assignment))
            assert torch.equal(found_TD, here.combine(here.dispatch(layer, x_TD, assignment)))


@pytest.mark.parametrize("routing", ["dense", "top_k=2", "threshold=0.9"])
@pytest.mark.parametrize("build", ALL)
def test_a_runner_gives_the_whole_forward_pass_with_any_backend(model, build, routing):
    rules = resolve_routing(routing, model.config)
    runner = TorchRunner(model, num_blocks=20, block_size=4, numerics="fast", experts=build(model))
    sequences = PagedSequences(runner, [17, 5], rules=[rules])
    logits = sequences.run([[9, 1, 1, 6], [3, 1, 1]])
    for found, tokens in zip(logits, sequences.tokens, strict=True):
        expected = model(torch.from_numpy(tokens)[None], routing=rules).logits_BSV[0]
        torch.testing.assert_close(found, expected, **CLOSE)
