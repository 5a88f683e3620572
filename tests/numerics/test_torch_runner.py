"""What only the PyTorch runner promises; what all runners do is in ``tests/contract/test_model_runners.py``."""

import pytest
import torch

from dsmoe_ray.inference.routing import resolve_routing
from tests.fakes.paged_sequences import PagedSequences
from tests.fakes.runner_kinds import make_model, make_runner

LENGTHS, SCHEDULE = [19, 7, 23, 1], [[5, 4, 10], [2, 5], [11, 1, 11], [1]]
RUNNERS = pytest.mark.parametrize("kind", ["torch exact", "torch fast"])


def run(runner, model):
    sequences = PagedSequences(runner, LENGTHS, rules=[resolve_routing("top_k=2", model.config)])
    return torch.cat(sequences.run(SCHEDULE))


@RUNNERS
def test_nothing_left_in_a_block_reaches_the_sequence_that_takes_it(kind):
    model = make_model()
    runner = make_runner(kind, model, num_blocks=40, block_size=4)
    expected = run(runner, model)
    for cached in (runner._cache.k_LNGd, runner._cache.v_LNGd):
        cached[:, : runner.num_blocks * runner.block_size] = float("nan")
    assert torch.equal(run(runner, model), expected)


def test_exact_rows_do_not_depend_on_the_size_of_blocks():
    model = make_model(attention="moa", activation="gelu", router="mlp")
    found = [run(make_runner("torch exact", model, num_blocks=60, block_size=size), model) for size in (1, 4, 16)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_a_wrong_entry_in_the_cache_shows():
    """The comparisons of runners with whole forward passes would notice a cache that loses a position."""
    model = make_model()
    rules = resolve_routing("dense", model.config)
    sequences = PagedSequences(make_runner("torch fast", model, num_blocks=40, block_size=4), [19], rules=[rules])
    sequences.step((0, 18))
    table = sequences.tables[0]
    sequences.runner._cache.k_LNGd[0, table[0] * 4 + 3] = 0.0
    sequences.step((0, 1))
    expected = model(torch.from_numpy(sequences.tokens[0])[None], routing=rules).logits_BSV[0]
    assert (sequences.finished()[0][-1] - expected[-1]).abs().max() > 0.01
