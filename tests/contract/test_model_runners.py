"""What every ``ModelRunner`` does: the logits of one forward pass over each whole sequence, however tokens come.

Float32. Both ways compute the same sums over other shapes, and so in another order: each differs from the true value by
some 1e-7 of the terms, which two layers and logits near ten carry to a few 1e-5. Exact numerics
are compared bit by bit with themselves.
"""

import pytest
import torch

from dsmoe_ray.inference.routing import resolve_routing
from tests.fakes.paged_sequences import PagedSequences
from tests.fakes.runner_kinds import EXACT_RUNNERS, FAST_RUNNERS, RUNNERS, make_model, make_runner, widen

# Some ten seconds and more as a whole.
pytestmark = pytest.mark.slow

CLOSE = {"rtol": 1e-5, "atol": 6e-5}
LENGTHS = [35, 7, 39, 1]
SCHEDULES = {
    "prefill": [[35], [7], [39], [1]],
    "prefill and decode": [[25] + [1] * 10, [3] + [1] * 4, [15] + [1] * 24, [1]],
    "chunks": [[5, 14, 16], [2, 5], [11, 1, 27], [1]],
    "decode": [[1] * 35, [1] * 7, [1] * 39, [1]],
}
FFN_ROUTINGS = ["dense", "top_k=2", "threshold=0.9", "top_p=0.6"]
MOA_ROUTINGS = ["attention:top_k=2", "attention:threshold=0.9", "attention:top_p=0.6/ffn:threshold=1.5"]
SHAPES = {
    "moa-gelu-mlp": {"attention": "moa", "activation": "gelu", "router": "mlp"},
    "moa-swiglu-linear": {"attention": "moa", "activation": "swiglu", "router": "linear"},
    "moa-swiglu with edges": {"attention": "moa", "head_dim": 32, "d_model": 80},
    "gqa-swiglu-linear": {"attention": "gqa", "activation": "swiglu", "router": "linear"},
    "gqa-gelu with edges": {"attention": "gqa", "activation": "gelu", "head_dim": 32, "d_model": 80},
    # Rows of a multiple of 32 are streamed for few tokens; sums of more than 256 products are cut into blocks.
    "gqa-swiglu in blocks": {"attention": "gqa", "head_dim": 96, "d_model": 64, "d_ff": 301},
    "gqa-dense ffn": {"attention": "gqa", "activation": "swiglu", "ffn": "dense"},
    "moa-dense ffn": {"attention": "moa", "activation": "gelu", "ffn": "dense"},
}
CASES = [
    *(("gqa-swiglu-linear", routing) for routing in FFN_ROUTINGS),
    *(("moa-gelu-mlp", routing) for routing in [*FFN_ROUTINGS, *MOA_ROUTINGS]),
    *(("moa-swiglu-linear", routing) for routing in MOA_ROUTINGS),
    *(("moa-dense ffn", routing) for routing in ["dense", *MOA_ROUTINGS[:2]]),
    ("gqa-dense ffn", "dense"),
]
EDGE_CASES = [
    *(("gqa-gelu with edges", routing) for routing in FFN_ROUTINGS[1:3]),
    *(("moa-swiglu with edges", routing) for routing in MOA_ROUTINGS[1:]),
    *(("gqa-swiglu in blocks", routing) for routing in FFN_ROUTINGS[:2]),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture(params=RUNNERS)
def kind(request):
    return request.param


@pytest.fixture(params=EXACT_RUNNERS)
def exact_kind(request):
    return request.param


def make_sequences(kind, model, lengths, routings, *, rule_idxs=None, **options):
    runner = make_runner(kind, model, num_blocks=60, **options)
    rules = [resolve_routing(routing, model.config) for routing in routings]
    return PagedSequences(runner, lengths, rules=rules, rule_idxs=rule_idxs)


def whole_forward(model, tokens, routing):
    rules = resolve_routing(routing, model.config)
    return model(torch.from_numpy(tokens)[None], routing=rules).logits_BSV[0]


def are_same_bits(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("shape", "routing"), [*CASES, *EDGE_CASES], ids=lambda value: value)
def test_logits_of_every_schedule_are_those_of_whole_forward_passes(kind, shape, routing):
    model = make_model(**SHAPES[shape])
    for name, schedule in SCHEDULES.items():
        sequences = make_sequences(kind, model, LENGTHS, [routing])
        for found, tokens in zip(sequences.run(schedule), sequences.tokens, strict=True):
            expected = whole_forward(model, tokens, routing)
            assert expected.std() > 0.5, "too small for the tolerance to mean anything"
            torch.testing.assert_close(found, expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("shape", ["moa-gelu-mlp", "moa-swiglu-linear"])
def test_sequences_of_one_step_follow_their_own_rules(kind, shape):
    model = make_model(**SHAPES[shape], tie=True)
    routings = [*FFN_ROUTINGS, *MOA_ROUTINGS]
    lengths = [19, 7, 23, 1, 5, 12, 33]
    sequences = make_sequences(kind, model, lengths, routings, rule_idxs=list(range(7)))
    schedule = [[length - 1, 1] if length > 1 else [1] for length in lengths]
    for found, tokens, routing in zip(sequences.run(schedule), sequences.tokens, routings, strict=True):
        torch.testing.assert_close(found, whole_forward(model, tokens, routing), **CLOSE)


def test_blocks_can_be_shared_later_and_in_the_very_step_that_fills_them(kind):
    model = make_model()
    sequences = make_sequences(kind, model, [35, 40, 37], ["attention:top_k=2/ffn:top_k=2"])
    for other in (1, 2):
        sequences.share_blocks(0, other, num_blocks=2)
    sequences.step((0, 33), (1, 5))
    sequences.step((0, 2), (1, 3), (2, 5))
    for found, tokens, shared in zip(sequences.logits, sequences.tokens, (0, 32, 32), strict=True):
        expected = whole_forward(model, tokens, "attention:top_k=2/ffn:top_k=2")
        torch.testing.assert_close(torch.cat(found), expected[shared:], **CLOSE)


def test_only_the_wanted_rows_get_logits(kind):
    model = make_model()

    def run(wanted):
        sequences = make_sequences(kind, model, [20, 3], ["top_k=2"])
        return sequences.runner.run(sequences.batch([(0, 20), (1, 3)], wanted=wanted))

    whole = run(None)
    assert whole.shape == (23, 270) and whole.dtype == torch.float32 and whole.device.type == "cpu"
    torch.testing.assert_close(run([4, 19, 22]), whole[[4, 19, 22]], **CLOSE)
    assert run([]).shape == (0, 270)


def test_what_was_left_in_a_block_does_not_reach_the_sequence_that_takes_it(exact_kind):
    model = make_model()
    rules = [resolve_routing("top_k=2", model.config)]
    runner = make_runner(exact_kind, model, num_blocks=12)
    expected = PagedSequences(runner, LENGTHS, rules=rules).run(SCHEDULES["chunks"])
    PagedSequences(runner, [50, 60, 40], rules=rules, seed=1).run([[50], [60], [40]])
    assert are_same_bits(PagedSequences(runner, LENGTHS, rules=rules).run(SCHEDULES["chunks"]), expected)


@pytest.mark.parametrize("kind", FAST_RUNNERS)
def test_fast_threshold_top_k_takes_the_mean_over_the_steps_tokens(kind):
    model = make_model(**SHAPES["moa-gelu-mlp"])
    for routing in ("threshold_top_k=1.0", "attention:threshold_top_k=1.1"):
        sequences = make_sequences(kind, model, [39], [routing])
        (found,) = sequences.run([[39]])
        torch.testing.assert_close(found, whole_forward(model, sequences.tokens[0], routing), **CLOSE)


def test_exact_threshold_top_k_takes_the_count_of_each_token(exact_kind):
    model = make_model(**SHAPES["moa-gelu-mlp"])
    sequences = make_sequences(exact_kind, model, [39], ["threshold_top_k=0.9"])
    (found,) = sequences.run([[39]])
    # Where a token always keeps an expert the count of the token makes it the plain threshold.
    plain = whole_forward(model, sequences.tokens[0], "threshold=0.9")
    torch.testing.assert_close(found, plain, **CLOSE)


@pytest.mark.parametrize("shape", ["moa-gelu-mlp", "gqa-swiglu-linear", "moa-swiglu with edges"])
def test_bfloat16_logits_are_as_close_to_float32_as_those_of_whole_forward_passes(kind, shape):
    model = make_model(**SHAPES[shape], dtype=torch.bfloat16)
    widened = widen(model)
    for schedule in SCHEDULES.values():
        sequences = make_sequences(kind, model, LENGTHS, ["dense"])
        found = torch.cat(sequences.run(schedule))
        plain, expected = (
            torch.cat([whole_forward(one, tokens, "dense") for tokens in sequences.tokens]) for one in (model, widened)
        )
        # The same number of roundings; where they fall decides the rest.
        assert 0 < (found - expected).norm() < 1.25 * (plain - expected).norm()


EXACT_ROUTINGS = [*FFN_ROUTINGS, "threshold_top_k=1.0", *MOA_ROUTINGS[::2]]
EXACT_LENGTHS = [19, 37, 1, 7, 12, 20, 34]
EXACT_SCHEDULES = {
    "token by token": [[1] * length for length in EXACT_LENGTHS],
    "mixed": [[9] + [1] * 10, [17, 5, 7, 1, 7], [1], [1] * 7, [11, 1], [2, 4, 14], [13, 1, 20]],
    # Each sequence waits until those before it are done.
    "one after another": [
        [length if step == index else 0 for step in range(index + 1)] for index, length in enumerate(EXACT_LENGTHS)
    ],
}


def run_side_by_side(kind, model, schedule, **options):
    """Run seven sequences with seven rules."""
    num_rules = len(EXACT_ROUTINGS)
    options |= {"rule_idxs": list(range(num_rules))}
    return make_sequences(kind, model, EXACT_LENGTHS, EXACT_ROUTINGS, **options).run(schedule)


@DTYPES
@pytest.mark.parametrize("shape", ["moa-swiglu-linear", "moa-gelu-mlp", "moa-swiglu with edges"])
def test_exact_rows_are_the_same_bits_alone_in_chunks_token_by_token_and_in_a_crowd(exact_kind, shape, dtype):
    model = make_model(**SHAPES[shape], dtype=dtype)
    expected = run_side_by_side(exact_kind, model, [[length] for length in EXACT_LENGTHS])
    for name, schedule in EXACT_SCHEDULES.items():
        assert are_same_bits(run_side_by_side(exact_kind, model, schedule), expected), name


@DTYPES
def test_exact_rows_of_a_wider_model_are_the_same_bits_with_two_threads(exact_kind, dtype):
    sizes = {"d_model": 256, "head_dim": 96, "d_ff": 301, "num_layers": 1, "vocab_size": 700}
    model = make_model(attention="gqa", dtype=dtype, **sizes)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [
            make_sequences(exact_kind, model, [90, 20], ["top_k=3"], num_threads=2).run(schedule)
            for schedule in ([[90], [20]], [[50, 30, 9, 1], [3, 15, 1, 1]])
        ]
    finally:
        torch.set_num_threads(before)
    assert are_same_bits(*runs)


def test_rows_of_fast_torch_are_not_so_the_comparison_of_bits_can_fail():
    model = make_model(**SHAPES["moa-swiglu-linear"])
    expected = run_side_by_side("torch fast", model, [[length] for length in EXACT_LENGTHS])
    assert not are_same_bits(run_side_by_side("torch fast", model, EXACT_SCHEDULES["token by token"]), expected)


def test_the_memory_of_the_cache_is_told_and_grows_with_its_blocks(kind):
    model = make_model(head_dim=32)
    few, many = (make_runner(kind, model, num_blocks=num_blocks) for num_blocks in (10, 30))
    # Two layers of keys and values of two heads of 32 numbers of 4 bytes, for 16 positions.
    assert many.kv_cache_bytes - few.kv_cache_bytes == 20 * 2 * 2 * 2 * 32 * 4 * 16
    assert (few.num_blocks, few.block_size, few.config) == (10, 16, model.config)
