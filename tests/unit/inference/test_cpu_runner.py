"""What the compiled runner refuses; what it computes is in ``tests/contract`` and ``tests/numerics``."""

import pytest

from dsmoe_ray.inference.routing import resolve_routing
from tests.fakes.paged_sequences import PagedSequences
from tests.fakes.runner_kinds import MAX_SEQS, MAX_TOKENS, make_model, make_runner


@pytest.mark.parametrize(
    ("lengths", "num_rules"),
    [([MAX_TOKENS // 2, MAX_TOKENS // 2 + 1], 1), ([1] * (MAX_SEQS + 1), 1), ([1], MAX_SEQS + 1)],
    ids=["tokens", "sequences", "rules"],
)
def test_a_step_that_its_memory_has_no_room_for_is_refused(lengths, num_rules):
    model = make_model()
    runner = make_runner("cpu native", model, num_blocks=30)
    rules = [resolve_routing("top_k=2", model.config) for _ in range(num_rules)]
    sequences = PagedSequences(runner, lengths, rules=rules)
    found = f"{sum(lengths)} tokens of {len(lengths)} sequences with {num_rules} routing rules"
    with pytest.raises(ValueError, match=f"{found}.*max_tokens={MAX_TOKENS} of max_seqs={MAX_SEQS}"):
        sequences.step(*enumerate(lengths))


def test_a_full_step_is_taken():
    model = make_model()
    runner = make_runner("cpu native", model, num_blocks=MAX_SEQS)
    lengths = [MAX_TOKENS // MAX_SEQS] * MAX_SEQS
    rules = [resolve_routing("top_k=2", model.config) for _ in range(MAX_SEQS)]
    sequences = PagedSequences(runner, lengths, rules=rules, rule_idxs=list(range(MAX_SEQS)))
    sequences.step(*enumerate(lengths))
    assert all(logits.isfinite().all() for logits in sequences.finished())
