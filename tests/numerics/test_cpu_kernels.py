"""What only the compiled CPU runner promises; what all runners do is in ``tests/contract/test_model_runners.py``."""

import pytest
import torch

from dsmoe_ray.inference.cpu_runner import count_block_bytes
from dsmoe_ray.inference.routing import resolve_routing
from tests.fakes.paged_sequences import PagedSequences
from tests.fakes.runner_kinds import MAX_TOKENS, make_model, make_runner, widen


@pytest.mark.parametrize("attention", ["moa", "gqa"])
def test_bfloat16_is_closer_to_float32_than_the_plain_forward_pass_in_bfloat16(attention):
    """What goes into a product is rounded to 8 bits; PyTorch rounds what comes out of each operation as well."""
    model = make_model(attention=attention, head_dim=32, d_model=80, dtype=torch.bfloat16)
    rules = resolve_routing("dense", model.config)
    sequences = PagedSequences(make_runner("cpu native", model, num_blocks=8), [40, 40], rules=[rules])
    found = torch.stack(sequences.run([[40], [40]]))
    tokens = torch.tensor([one.tolist() for one in sequences.tokens])
    plain, expected = (one(tokens, routing=rules).logits_BSV for one in (model, widen(model)))
    assert 0 < (found - expected).norm() < (plain - expected).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_number_of_threads_changes_no_bit(dtype):
    sizes = {"d_model": 256, "head_dim": 96, "d_ff": 301, "num_layers": 1}
    model = make_model(attention="gqa", dtype=dtype, **sizes)
    rules = resolve_routing("top_k=3", model.config)
    found = []
    for num_threads in (1, 2, 3):
        runner = make_runner("cpu native", model, num_blocks=8, num_threads=num_threads)
        found.append(torch.cat(PagedSequences(runner, [60, 20], rules=[rules]).run([[50] + [1] * 10, [10] * 2])))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Elsewhere:
    """Experts that the runner cannot tell from remote ones: it asks for them layer by layer."""

    def __init__(self, experts, dtype):
        self.experts, self.dtype = experts, dtype

    def dispatch(self, layer, x_TD, assignment):
        return self.experts.dispatch(layer, x_TD, assignment)

    def combine(self, handle):
        return self.experts.combine(handle).to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_asked_layer_by_layer_give_the_bits_of_all_layers_in_one_call(dtype):
    model = make_model(attention="moa", d_model=64, dtype=dtype)
    rules = resolve_routing("top_k=2", model.config)
    found = []
    for wrap in (lambda experts: experts, lambda experts: Elsewhere(experts, torch.float32)):
        runner = make_runner("cpu native", model, num_blocks=8)
        runner.experts = wrap(runner.experts)
        found.append(torch.cat(PagedSequences(runner, [40, 20], rules=[rules]).run([[30, 10], [20]])))
    assert torch.equal(*found)


def test_outputs_of_experts_may_come_in_bfloat16():
    """They are rounded to 8 bits then, 4e-3 of each, on the way of two layers to logits."""
    model = make_model(attention="gqa", d_model=64, dtype=torch.bfloat16)
    rules = resolve_routing("dense", model.config)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        runner = make_runner("cpu native", model, num_blocks=8)
        runner.experts = Elsewhere(runner.experts, dtype)
        found.append(torch.cat(PagedSequences(runner, [30], rules=[rules]).run([[30]])))
    assert 0 < (found[0] - found[1]).norm() < 3e-2 * found[0].norm()


@pytest.mark.parametrize("head_dim", [16, 24])
def test_the_kv_cache_takes_the_memory_that_is_counted_for_its_blocks(head_dim):
    model = make_model(head_dim=head_dim)
    runner = make_runner("cpu native", model, num_blocks=5)
    assert runner.kv_cache_bytes == 5 * count_block_bytes(model.config, torch.float32)


def test_a_step_of_more_tokens_than_there_is_memory_for_is_refused():
    model = make_model()
    runner = make_runner("cpu native", model, num_blocks=20)
    sequences = PagedSequences(runner, [MAX_TOKENS, 1], rules=[resolve_routing("dense", model.config)])
    with pytest.raises(ValueError, match=r"a step has 161 tokens of 2 sequences .* takes up to max_tokens=160"):
        sequences.step((0, MAX_TOKENS), (1, 1))


def test_rules_that_change_with_every_step_are_those_of_the_step():
    """The runner keeps what it has described for the kernels, of few combinations of rules."""
    model = make_model()
    runner = make_runner("cpu native", model, num_blocks=4)
    expected = {}
    for round_ in range(2):
        for idx in range(300):
            rules = resolve_routing(f"threshold={0.5 + idx / 300}", model.config)
            sequences = PagedSequences(runner, [3], rules=[rules])
            [logits] = sequences.run([[3]])
            assert torch.equal(expected.setdefault(idx, logits), logits), (round_, idx)
    assert len({tuple(logits[0].tolist()) for logits in expected.values()}) > 2
