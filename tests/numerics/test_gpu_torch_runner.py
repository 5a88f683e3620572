"""The paged runner on a GPU gives what whole forward passes on the CPU give, with and without CUDA graphs.

Run it with ``bash tests/gpu.sh``. Float32 products are not shortened to TF32 (torch's default), so that both devices
differ in the order of sums and in the last bit of exp and erf only.
"""

import pytest
import torch

from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.row_math import FastMath
from dsmoe_ray.inference.sparse_experts import experts_of, has_grouped_gemm, run_by_expert, run_grouped, run_wide
from dsmoe_ray.inference.torch_runner import TorchRunner
from dsmoe_ray.model.dispatch import ExpertAssignment
from tests.contract.test_model_runners import CASES, FFN_ROUTINGS, MOA_ROUTINGS, SHAPES, whole_forward
from tests.fakes.paged_sequences import PagedSequences
from tests.fakes.runner_kinds import make_model, widen

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
OTHER_DEVICE = {"rtol": 5e-5, "atol": 1e-4}
"""What the CPU's own two ways differ by, a few times; other implementations of exp and erf besides."""
LENGTHS = [19, 7, 23, 1]
SCHEDULES = {
    "prefill": [[19], [7], [23], [1]],
    "prefill and decode": [[9] + [1] * 10, [3] + [1] * 4, [1] * 23, [1]],
    "chunks": [[5, 4, 10], [2, 5], [11, 1, 11], [1]],
    "decode": [[1] * 19, [1] * 7, [1] * 23, [1]],
}


def on_gpu(shape, dtype=torch.float32):
    """Return the model as it is loaded to a GPU, weights in its compute type."""
    return make_model(**SHAPES[shape], dtype=dtype).to(GPU)


def make_runner(model, *, graphs=True):
    return TorchRunner(model, num_blocks=40, block_size=4, numerics="fast", max_graph_seqs=8 if graphs else 0)


def run(model, lengths, chunk_sizes, routings, *, graphs=True):
    """Return the sequences, the i-th with the i-th of the rules in turn, and their logits."""
    rules = [resolve_routing(routing, model.config) for routing in routings]
    rule_idxs = [index % len(rules) for index in range(len(lengths))]
    sequences = PagedSequences(make_runner(model, graphs=graphs), lengths, rules=rules, rule_idxs=rule_idxs)
    return sequences, sequences.run(chunk_sizes)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "plain"])
@pytest.mark.parametrize(("shape", "routing"), CASES, ids=lambda value: value)
def test_float32_logits_of_every_schedule_are_those_of_whole_forward_passes_on_the_cpu(shape, routing, graphs):
    model, on_cpu = on_gpu(shape), make_model(**SHAPES[shape])
    for schedule in SCHEDULES.values():
        sequences, logits = run(model, LENGTHS, schedule, [routing], graphs=graphs)
        for found, tokens in zip(logits, sequences.tokens, strict=True):
            torch.testing.assert_close(found, whole_forward(on_cpu, tokens, routing), **OTHER_DEVICE)


def test_float32_graphs_give_what_plain_steps_give_to_sequences_with_different_rules():
    model = on_gpu("moa-gelu-mlp")
    routings = [*FFN_ROUTINGS, *MOA_ROUTINGS, "threshold_top_k=1.0"]
    # Sequences end at different steps, so that the batch shrinks through the sizes of graphs.
    lengths = [20, 12, 23, 9, 17, 14, 11, 19]
    chunks = [[5] + [1] * (length - 5) for length in lengths]
    _, found = run(model, lengths, chunks, routings)
    _, expected = run(model, lengths, chunks, routings, graphs=False)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **OTHER_DEVICE)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "plain"])
@pytest.mark.parametrize("shape", ["moa-gelu-mlp", "gqa-swiglu-linear"])
def test_bfloat16_logits_with_every_expert_are_as_close_to_float32_as_those_of_the_cpu(shape, graphs):
    model, on_cpu = on_gpu(shape, torch.bfloat16), make_model(**SHAPES[shape], dtype=torch.bfloat16)
    widened = widen(on_cpu)
    for schedule in SCHEDULES.values():
        sequences, logits = run(model, LENGTHS, schedule, ["dense"], graphs=graphs)
        found = torch.cat(logits)
        plain, expected = (
            torch.cat([whole_forward(one, tokens, "dense") for tokens in sequences.tokens]) for one in (on_cpu, widened)
        )
        # About as many roundings; where they fall decides the rest.
        assert 0 < (found - expected).norm() < 1.5 * (plain - expected).norm()


def test_a_graph_replayed_twice_on_the_same_step_gives_the_same_logits():
    # Selections of experts may flip where rounding differs, so sparse rules are compared with themselves.
    model = on_gpu("gqa-swiglu-linear", torch.bfloat16)
    runner = make_runner(model)
    sequences = PagedSequences(runner, [9, 9, 9], rules=[resolve_routing("top_k=2", model.config)])
    sequences.step((0, 8), (1, 8), (2, 8))
    batch = sequences.batch([(0, 1), (1, 1), (2, 1)])
    first, second = runner.run(batch), runner.run(batch)
    assert runner._graphs.num_recorded == 1
    assert torch.equal(first, second) and torch.isfinite(first).all()


@pytest.mark.parametrize("way", ["grouped", "wide"])
@pytest.mark.parametrize("num_tokens", [1, 5, 64])
def test_bfloat16_experts_on_a_gpu_give_what_a_loop_over_experts_gives(way, num_tokens):
    model = on_gpu("gqa-swiglu-linear", torch.bfloat16)
    weights = experts_of(model)[0].to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, 24, generator=generator).to(GPU, torch.bfloat16)
    if way == "grouped" and not has_grouped_gemm(x_TD, weights):
        pytest.skip("this GPU has no grouped GEMM without waiting for the device")
    ids_TK = torch.rand(num_tokens, 6, generator=generator).argsort(-1)[:, :3].sort(-1).values.int()
    gates_TK = torch.rand(num_tokens, 3, generator=generator)
    # Some tokens want two experts only.
    ids_TK[::2, 2], gates_TK[::2, 2] = -1, 0.0
    assignment = ExpertAssignment(ids_TK.to(GPU), gates_TK.to(GPU))
    expected = run_by_expert(x_TD, assignment, weights, FastMath()).float()
    if way == "grouped":
        found = run_grouped(x_TD, assignment, weights, FastMath()).float()
    else:
        found = run_wide(x_TD, assignment, weights).float()
    # Roundings to 8 bits (4e-3 each) of gated hidden units and of outputs.
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()
