"""The paged runner gives what one forward pass over each whole sequence gives, however its tokens are cut and mixed.

Float32. Both ways compute the same sums over other shapes, and so in another order: each differs from the true value by
some 1e-7 of the terms, which two layers and logits of size ten carry to about 1e-5. Exact numerics are compared bit by
bit with themselves.
"""

import pytest
import torch

from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.inference.torch_runner import TorchRunner
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.paged_sequences import PagedSequences

CLOSE = {"rtol": 1e-5, "atol": 3e-5}
LENGTHS = [19, 7, 23, 1]
SCHEDULES = {
    "prefill": [[19], [7], [23], [1]],
    "prefill and decode": [[9] + [1] * 10, [3] + [1] * 4, [1] * 23, [1]],
    "chunks": [[5, 4, 10], [2, 5], [11, 1, 11], [1]],
    "decode": [[1] * 19, [1] * 7, [1] * 23, [1]],
}
FFN_ROUTINGS = ["dense", "top_k=2", "threshold=0.9", "top_p=0.6"]
MOA_ROUTINGS = ["attention:top_k=2", "attention:threshold=0.9", "attention:top_p=0.6/ffn:threshold=1.5"]
SHAPES = {
    "moa-gelu-mlp": {"attention": "moa", "activation": "gelu", "router": "mlp"},
    "gqa-swiglu-linear": {"attention": "gqa", "activation": "swiglu", "router": "linear"},
    "moa-swiglu-linear": {"attention": "moa", "activation": "swiglu", "router": "linear"},
    "gqa-dense ffn": {"attention": "gqa", "activation": "swiglu", "ffn": "dense"},
    "moa-dense ffn": {"attention": "moa", "activation": "gelu", "ffn": "dense"},
}
NUMERICS = pytest.mark.parametrize("numerics", ["exact", "fast"])


def make_model(*, attention="moa", activation="gelu", router="linear", ffn="moe", dtype=torch.float32, tie=False):
    routers = {
        "linear": {"kind": "linear", "gate_scale": 6.0},
        "mlp": {"kind": "mlp", "d_hidden": 8, "gates": "renormalized", "gate_scale": 6.0},
    }
    attentions = {
        "moa": {
            "kind": "moa",
            "num_experts": 3,
            "num_kv_heads": 2,
            "head_dim": 8,
            "router": {**routers[router], "gate_scale": 3.0},
        },
        "gqa": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    }
    ffns = {
        "moe": {"kind": "moe", "num_experts": 6, "d_ff": 8, "activation": activation, "router": routers[router]},
        "dense": {"kind": "dense", "d_ff": 20, "activation": activation},
    }
    config = ModelConfig.model_validate(
        {
            "vocab_size": 270,
            "d_model": 24,
            "num_layers": 2,
            "max_seq_len": 32,
            "attention": attentions[attention],
            "ffn": ffns[ffn],
            "init_std": 0.3,
            "tie_embeddings": tie,
        }
    )
    model = Transformer(config, compute_dtype=dtype)
    initialize(model, config, seed=3)
    return model.requires_grad_(False)


def make_runner(model, numerics, *, block_size=4):
    return TorchRunner(model, num_blocks=40, block_size=block_size, numerics=numerics)


def whole_forward(model, tokens, rules):
    return model(torch.from_numpy(tokens)[None], routing=rules).logits_BSV[0]


CASES = [
    *(("gqa-swiglu-linear", routing) for routing in FFN_ROUTINGS),
    *(("moa-gelu-mlp", routing) for routing in [*FFN_ROUTINGS, *MOA_ROUTINGS]),
    *(("moa-swiglu-linear", routing) for routing in MOA_ROUTINGS),
    *(("moa-dense ffn", routing) for routing in ["dense", *MOA_ROUTINGS[:2]]),
    ("gqa-dense ffn", "dense"),
]


@NUMERICS
@pytest.mark.parametrize(("shape", "routing"), CASES, ids=lambda value: value)
def test_logits_of_every_schedule_are_those_of_whole_forward_passes(shape, routing, numerics):
    model = make_model(**SHAPES[shape])
    rules = resolve_routing(routing, model.config)
    for name, schedule in SCHEDULES.items():
        sequences = PagedSequences(make_runner(model, numerics), LENGTHS, rules=[rules])
        for found, tokens in zip(sequences.run(schedule), sequences.tokens, strict=True):
            torch.testing.assert_close(
                found, whole_forward(model, tokens, rules), **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
            )


@NUMERICS
@pytest.mark.parametrize("shape", ["moa-gelu-mlp", "moa-swiglu-linear"])
def test_sequences_with_different_rules_share_a_step(shape, numerics):
    model = make_model(**SHAPES[shape], tie=True)
    rules = [resolve_routing(routing, model.config) for routing in [*FFN_ROUTINGS, *MOA_ROUTINGS]]
    lengths = [19, 7, 23, 1, 5, 12, 9]
    sequences = PagedSequences(make_runner(model, numerics), lengths, rules=rules, rule_idxs=list(range(7)))
    schedule = [[length - 1, 1] if length > 1 else [1] for length in lengths]
    for found, tokens, one in zip(sequences.run(schedule), sequences.tokens, rules, strict=True):
        torch.testing.assert_close(found, whole_forward(model, tokens, one), **CLOSE)


def test_fast_threshold_top_k_takes_the_mean_over_the_steps_tokens():
    model = make_model(**SHAPES["moa-gelu-mlp"])
    rules = resolve_routing("threshold_top_k=1.0", model.config)
    sequences = PagedSequences(make_runner(model, "fast"), [19], rules=[rules])
    (found,) = sequences.run([[19]])
    torch.testing.assert_close(found, whole_forward(model, sequences.tokens[0], rules), **CLOSE)


def test_exact_threshold_top_k_takes_the_count_of_each_token():
    model = make_model(**SHAPES["moa-gelu-mlp"])
    rules = resolve_routing("threshold_top_k=0.9", model.config)
    # Where a token always keeps an expert the count of the token makes it the plain threshold.
    plain = resolve_routing("threshold=0.9", model.config)
    sequences = PagedSequences(make_runner(model, "exact"), [19], rules=[rules])
    (found,) = sequences.run([[19]])
    torch.testing.assert_close(found, whole_forward(model, sequences.tokens[0], plain), **CLOSE)


@NUMERICS
@pytest.mark.parametrize("shape", ["moa-gelu-mlp", "gqa-swiglu-linear"])
def test_bfloat16_logits_are_close_to_whole_forward_passes(shape, numerics):
    model = make_model(**SHAPES[shape], dtype=torch.bfloat16)
    rules = resolve_routing("dense", model.config)
    for schedule in SCHEDULES.values():
        sequences = PagedSequences(make_runner(model, numerics), LENGTHS, rules=[rules])
        for found, tokens in zip(sequences.run(schedule), sequences.tokens, strict=True):
            expected = whole_forward(model, tokens, rules)
            # Two layers of 8-bit roundings (4e-3 each) on top of each other, on both sides.
            assert (found - expected).abs().max() < 5e-2 * expected.abs().max()


EXACT_ROUTINGS = [*FFN_ROUTINGS, "threshold_top_k=1.0", MOA_ROUTINGS[0]]
EXACT_LENGTHS = [19, 31, 1, 7, 12, 20]
EXACT_SCHEDULES = {
    "token by token": [[1] * length for length in EXACT_LENGTHS],
    "mixed": [[9] + [1] * 10, [17, 5, 1, 1, 7], [1], [1] * 7, [11, 1], [2, 4, 14]],
}


def run_exactly(model, schedule, *, numerics="exact", block_size=4):
    """Run six sequences with six rules side by side."""
    rules = [resolve_routing(routing, model.config) for routing in EXACT_ROUTINGS]
    runner = make_runner(model, numerics, block_size=block_size)
    return PagedSequences(runner, EXACT_LENGTHS, rules=rules, rule_idxs=list(range(6))).run(schedule)


def are_same_bits(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["moa-swiglu-linear", "moa-gelu-mlp"])
def test_exact_rows_are_the_same_bits_alone_in_chunks_token_by_token_and_in_a_crowd(shape, dtype):
    model = make_model(**SHAPES[shape], dtype=dtype)
    expected = run_exactly(model, [[length] for length in EXACT_LENGTHS])
    for name, schedule in EXACT_SCHEDULES.items():
        assert are_same_bits(run_exactly(model, schedule), expected), name
    assert are_same_bits(run_exactly(model, EXACT_SCHEDULES["mixed"], block_size=16), expected)
    # One after another: each sequence waits until those before it are done.
    after = [
        [length if step == index else 0 for step in range(index + 1)] for index, length in enumerate(EXACT_LENGTHS)
    ]
    assert are_same_bits(run_exactly(model, after), expected)


def test_fast_rows_are_not_so_the_comparison_of_bits_can_fail():
    model = make_model(**SHAPES["moa-swiglu-linear"])
    expected = run_exactly(model, [[length] for length in EXACT_LENGTHS], numerics="fast")
    assert not are_same_bits(run_exactly(model, EXACT_SCHEDULES["token by token"], numerics="fast"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_exact_rows_of_a_wider_model_are_the_same_bits_with_two_threads(dtype):
    config = ModelConfig.model_validate(
        {
            "vocab_size": 700,
            "d_model": 256,
            "num_layers": 1,
            "max_seq_len": 96,
            "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
            "ffn": {"kind": "moe", "num_experts": 8, "d_ff": 96, "activation": "swiglu"},
        }
    )
    model = Transformer(config, compute_dtype=dtype)
    initialize(model, config, seed=0)
    model.requires_grad_(False)
    rules = [resolve_routing("top_k=3", config)]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = PagedSequences(make_runner(model, "exact"), [82, 12], rules=rules).run([[82], [12]])
        parts = PagedSequences(make_runner(model, "exact"), [82, 12], rules=rules).run([[61, 20, 1], [3, 8, 1]])
    finally:
        torch.set_num_threads(before)
    assert are_same_bits(parts, whole)


@NUMERICS
def test_nothing_left_in_a_block_reaches_the_sequence_that_takes_it(numerics):
    model = make_model()
    rules = resolve_routing("top_k=2", model.config)
    runner = make_runner(model, numerics)
    expected = PagedSequences(runner, LENGTHS, rules=[rules]).run(SCHEDULES["chunks"])
    for cached in (runner._cache.k_LNGd, runner._cache.v_LNGd):
        cached[:, : runner.num_blocks * runner.block_size] = float("nan")
    found = PagedSequences(runner, LENGTHS, rules=[rules]).run(SCHEDULES["chunks"])
    assert are_same_bits(found, expected)


def test_a_wrong_entry_in_the_cache_shows():
    """The comparisons above would notice a cache that loses a position."""
    model = make_model()
    rules = resolve_routing("dense", model.config)
    sequences = PagedSequences(make_runner(model, "fast"), [19], rules=[rules])
    sequences.step((0, 18))
    table = sequences.tables[0]
    sequences.runner._cache.k_LNGd[0, table[0] * 4 + 3] = 0.0
    sequences.step((0, 1))
    expected = whole_forward(model, sequences.tokens[0], rules)
    assert (sequences.finished()[0][-1] - expected[-1]).abs().max() > 100 * CLOSE["atol"]
