"""Steps in two halves."""

import numpy as np
import pytest
import torch

from dsmoe_ray.inference.cpu_runner import CpuRunner
from dsmoe_ray.inference.micro_batches import split_batch, take_turns
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.torch_runner import TorchRunner
from tests.fakes.paged_sequences import PagedSequences
from tests.fakes.runner_kinds import MAX_SEQS, MAX_TOKENS, make_experts, make_model, make_runner, with_kernels

LENGTHS = [3, 40, 5, 1, 20]


def make_batch(runner, model, lengths=LENGTHS, *, routing="top_k=2", **options):
    sequences = PagedSequences(runner, lengths, rules=[resolve_routing(routing, model.config)])
    return sequences.batch(list(enumerate(lengths)), **options)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def runner(model):
    return make_runner("cpu native", model, num_blocks=40)


def test_halves_hold_the_sequences_and_the_wanted_rows_of_the_whole(model, runner):
    batch = make_batch(runner, model, wanted=[2, 42, 43, 47, 48, 68])
    first, second = split_batch(batch, min_tokens=1, mean_over_step=False)
    assert (first.num_tokens, second.num_tokens) == (43, 26)
    assert (first.num_sequences, second.num_sequences) == (2, 3)
    for name in ("token_ids_T", "first_positions_B", "rule_idxs_B", "block_tables"):
        joined = np.concatenate([getattr(first, name), getattr(second, name)])
        assert np.array_equal(joined, getattr(batch, name)), name
    assert first.query_starts.tolist() == [0, 3, 43] and second.query_starts.tolist() == [0, 5, 6, 26]
    assert first.logits_rows_R.tolist() == [2, 42] and second.logits_rows_R.tolist() == [0, 4, 5, 25]
    assert first.rules is second.rules is batch.rules


@pytest.mark.parametrize(
    ("lengths", "options"),
    [([7], {}), ([3, 40], {"min_tokens": 4}), ([20, 20], {"routing": "ffn:threshold_top_k=1", "mean_over_step": True})],
    ids=["one sequence", "a small half", "a mean over the step"],
)
def test_a_step_that_cannot_be_halved_stays_whole(model, runner, lengths, options):
    wanted = {"min_tokens": 1, "mean_over_step": False} | options
    batch = make_batch(runner, model, lengths, routing=wanted.pop("routing", "top_k=2"))
    assert split_batch(batch, **wanted) == [batch]


def test_runs_take_turns_and_return_their_values():
    events = []

    def run(name, num_steps):
        for step in range(num_steps):
            events.append(f"{name}{step}")
            yield
        return name

    assert take_turns([run("a", 3), run("b", 2)]) == ["a", "b"]
    assert events == ["a0", "b0", "a1", "b1", "a2"]


class PausedExperts:
    """Experts elsewhere: what is dispatched is computed when it is asked for, from copies of what was sent."""

    def __init__(self, experts):
        self.experts, self.events = experts, []

    def dispatch(self, layer, x_TD, assignment):
        self.events.append(("dispatch", layer, len(x_TD)))
        return layer, x_TD, assignment

    def combine(self, handle):
        self.events.append(("combine", handle[0], len(handle[1])))
        return self.experts.combine(self.experts.dispatch(*handle)).clone()


@pytest.mark.parametrize("kind", ["cpu native", "torch exact"])
def test_halves_that_take_turns_give_the_bits_of_the_whole_step(model, kind):
    expected = run_two_steps(make_runner(kind, model, num_blocks=40), model)
    experts = PausedExperts(make_experts(kind, model))
    found = run_two_steps(make_runner_with(kind, model, experts), model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    # The shared blocks of the second half are filled by the first one in the same step.
    first, second = 39, 3
    assert experts.events[:4] == [
        ("dispatch", 0, first),
        ("dispatch", 0, second),
        ("combine", 0, first),
        ("dispatch", 1, first),
    ]


def make_runner_with(kind, model, experts):
    options = {"num_blocks": 40, "experts": experts, "min_micro_batch_tokens": 2}
    if kind.startswith("torch"):
        return TorchRunner(model, block_size=16, numerics="exact", **options)
    return with_kernels(kind, lambda: CpuRunner(model, max_tokens=MAX_TOKENS, max_seqs=MAX_SEQS, **options))


def run_two_steps(runner, model):
    sequences = PagedSequences(runner, [40, 35, 3], rules=[resolve_routing("top_k=2", model.config)])
    sequences.share_blocks(0, 1, num_blocks=2)
    sequences.step((0, 39), (1, 2), (2, 1))
    sequences.step((0, 1), (1, 1), (2, 2))
    return [torch.cat(parts) for parts in sequences.logits]
