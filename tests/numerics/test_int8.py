"""Matrices of int8 on the compiled CPU kernels: what is computed, and that no bit of a row depends on other rows.

A token's inputs are rounded to 16 bits, 1.5e-5 of the largest of a block, and so are hidden units: sums of some
hundred terms of size one differ from the unrounded by a few 1e-5, outputs after a second product by a few times more.
"""

import pytest
import torch

from dsmoe_ray.inference.cpu_experts import CpuExperts
from dsmoe_ray.inference.cpu_runner import CpuRunner, count_block_bytes
from dsmoe_ray.inference.int8_weights import pack, pack_experts, pack_model
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.sparse_experts import StackedWeights, experts_of
from dsmoe_ray.model.dispatch import ExpertAssignment
from tests.fakes.paged_sequences import PagedSequences
from tests.fakes.runner_kinds import MAX_SEQS, MAX_TOKENS, make_model, widen, with_kernels

KINDS = ("cpu native", "cpu portable")
SHAPES = {
    "moa-gelu-mlp": {"attention": "moa", "activation": "gelu", "router": "mlp"},
    "gqa-swiglu": {"attention": "gqa", "head_dim": 32, "d_model": 80, "d_ff": 301},
    "dense ffn": {"attention": "gqa", "ffn": "dense", "d_model": 64, "d_ff": 33},
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
by_kind = pytest.mark.parametrize("kind", KINDS)
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def pack_all(model, **options):
    return pack_model(model, experts_of(model), **options)


def unpack(matrices, num_outputs, num_inputs):
    """Return float32 (X, N, K)."""
    values, scales = matrices
    num_matrices, groups, blocks, pairs, lanes, two = values.shape
    whole = values.permute(0, 1, 4, 2, 3, 5).reshape(num_matrices, groups * lanes, blocks * pairs * two).float()
    return (whole * scales.view(num_matrices, groups * lanes, 1))[:, :num_outputs, :num_inputs]


def round_like_int8(model):
    """Return a float32 model with the weights that int8 ones stand for."""
    packed, rounded, config = pack_all(model), widen(model), model.config
    width, kv_width = (
        heads * config.attention.head_dim for heads in (config.attention.num_heads, config.attention.num_kv_heads)
    )
    for block, trunk, experts in zip(rounded.blocks, packed.trunk, packed.experts, strict=True):
        for name, num_outputs in (("wq", width), ("wk", kv_width), ("wv", kv_width)):
            parameter = getattr(block.attention, name)
            parameter.copy_(unpack(getattr(trunk, name), num_outputs, config.d_model)[0].view_as(parameter))
        wo_DW = unpack(trunk.wo, config.d_model, width)[0]
        block.attention.wo.copy_(wo_DW.t().reshape(block.attention.wo.shape))
        [ffn] = experts_of_block(block)
        ffn.w1_EFD.copy_(unpack(experts.w1, config.ffn.d_ff, config.d_model))
        ffn.w2_EFD.copy_(unpack(experts.w2, config.d_model, config.ffn.d_ff).transpose(1, 2))
        if experts.w3 is not None:
            ffn.w3_EFD.copy_(unpack(experts.w3, config.ffn.d_ff, config.d_model))
    rounded.embedding.weight.copy_(packed.embedding_VD)
    rounded.head.weight.copy_(unpack(packed.head, config.vocab_size, config.d_model)[0])
    return rounded


def experts_of_block(block):
    holder = torch.nn.Module()
    holder.blocks = torch.nn.ModuleList([block])
    return experts_of(holder)


def run(model, schedule, *, kind="cpu native", lengths=(40, 20, 33), routing="top_k=2", num_threads=1, int8=True):
    ffn_routing = "dense" if not hasattr(model.config.ffn, "num_experts") else routing
    rules = resolve_routing(ffn_routing, model.config)
    runner = with_kernels(
        kind,
        lambda: CpuRunner(
            model,
            num_blocks=20,
            max_tokens=MAX_TOKENS,
            max_seqs=MAX_SEQS,
            num_threads=num_threads,
            int8=pack_all(model) if int8 else None,
        ),
    )
    return torch.cat(PagedSequences(runner, list(lengths), rules=[rules]).run(schedule))


@by_kind
@by_shape
def test_logits_are_those_of_a_model_with_the_rounded_weights(kind, shape):
    """Keys and values are bfloat16 here, with 8 bits: 4e-3 of each, as nothing else is; weights rounded to 7 bits."""
    model = make_model(**shape)
    schedule = [[30] + [1] * 10, [20], [3, 30]]
    found = run(model, schedule, kind=kind, routing="dense")
    expected = run(round_like_int8(model), schedule, kind=kind, routing="dense", int8=False)
    unrounded = run(model, schedule, kind=kind, routing="dense", int8=False)
    assert (found - expected).norm() < 0.3 * (unrounded - expected).norm() < 0.03 * expected.norm()


@by_kind
@by_shape
@DTYPES
def test_rows_are_the_same_bits_alone_in_chunks_token_by_token_and_in_a_crowd(kind, shape, dtype):
    model = make_model(**shape, dtype=dtype)
    expected = run(model, [[40], [20], [33]], kind=kind)
    for schedule in ([[1] * 40, [1] * 20, [1] * 33], [[9, 31], [0, 0, 20], [33]], [[40], [0, 11, 9], [0, 0, 0, 33]]):
        assert torch.equal(run(model, schedule, kind=kind), expected)


def test_the_number_of_threads_changes_no_bit():
    model = make_model(attention="gqa", d_model=272, head_dim=96, d_ff=301, num_layers=1)
    schedule = [[30] + [1] * 10, [20], [33]]
    found = [run(model, schedule, num_threads=num_threads) for num_threads in (1, 2, 3)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_weights_that_are_whole_multiples_of_their_scale_are_kept_as_they_are():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-126, 127, (3, 21, 50), generator=generator).float()
    weights[:, :, 7] = 127.0
    weights *= torch.rand(3, 21, 1, generator=generator).bfloat16().float()
    weights[1, 4] = 0.0
    packed = pack(weights)
    assert packed.values.dtype == torch.int8 and packed.values.shape == (3, 2, 2, 16, 16, 2)
    # One rounding of a product of a whole number and a scale.
    torch.testing.assert_close(unpack(packed, 21, 50), weights, rtol=2e-7, atol=0.0)


def test_a_weight_is_off_by_at_most_half_of_a_127th_of_the_largest_of_its_output():
    weights = torch.randn(2, 40, 70, generator=torch.Generator().manual_seed(0))
    error = (unpack(pack(weights), 40, 70) - weights).abs()
    assert (error <= weights.abs().amax(-1, keepdim=True) / 127 * 0.50001).all()
    assert error.max() > 0.0


def make_experts(kind, weights):
    packed = pack_experts(StackedWeights(*weights))
    return with_kernels(kind, lambda: CpuExperts([packed], max_tokens=64, num_threads=1)), packed


@by_kind
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("num_tokens", [1, 8, 40])
def test_experts_give_the_gated_sum_of_their_rounded_weights(kind, activation, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (4, 50, 90)
    weights = [0.1 * torch.randn(shape, generator=generator) for _ in range(3 if activation == "swiglu" else 2)]
    experts, packed = make_experts(kind, [*weights, *[None] * (3 - len(weights))])
    x_TD = torch.randn(num_tokens, 90, generator=generator)
    ids_TK = torch.tensor([[0, 2]] * num_tokens, dtype=torch.int32)
    gates_TK = torch.rand(num_tokens, 2, generator=generator)
    found_TD = experts.combine(experts.dispatch(0, x_TD, ExpertAssignment(ids_TK, gates_TK)))
    expected_TD = torch.zeros(num_tokens, 90, dtype=torch.float64)
    for k, expert in enumerate((0, 2)):
        w1_FD, w2_DF = unpack(packed.w1, 50, 90)[expert].double(), unpack(packed.w2, 90, 50)[expert].double()
        up_TF = x_TD.double() @ w1_FD.t()
        if packed.w3 is None:
            hidden_TF = torch.nn.functional.gelu(up_TF)
        else:
            w3_FD = unpack(packed.w3, 50, 90)[expert].double()
            hidden_TF = torch.nn.functional.silu(up_TF) * (x_TD.double() @ w3_FD.t())
        expected_TD += (gates_TK[:, k : k + 1].double() * hidden_TF) @ w2_DF.t()
    torch.testing.assert_close(found_TD.double(), expected_TD, rtol=0.0, atol=2e-4 * expected_TD.abs().max().item())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_spoils_its_own_token_only(bad):
    model = make_model(attention="gqa", d_model=64)
    layers = pack_all(model).experts
    experts = with_kernels("cpu native", lambda: CpuExperts(layers, max_tokens=8, num_threads=1))
    x_TD = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assignment = ExpertAssignment(torch.tensor([[1]] * 3, dtype=torch.int32), torch.ones(3, 1))
    expected = experts.combine(experts.dispatch(0, x_TD, assignment))
    x_TD[1, 5] = bad
    found = experts.combine(experts.dispatch(0, x_TD, assignment))
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and not found[1].isfinite().any()


def test_a_models_own_weights_are_let_go_of_layer_by_layer():
    model = make_model(num_layers=2)
    calls = []
    packed = pack_all(model, after_layer=lambda: calls.append(1))
    assert len(calls) == 3 and len(packed.trunk) == len(packed.experts) == 2


def test_keys_and_values_take_two_bytes_each():
    model = make_model(head_dim=24)
    runner = with_kernels(
        "cpu native",
        lambda: CpuRunner(model, num_blocks=5, max_tokens=8, max_seqs=2, num_threads=1, int8=pack_all(model)),
    )
    assert runner.kv_cache_bytes == 5 * count_block_bytes(model.config, torch.bfloat16)
