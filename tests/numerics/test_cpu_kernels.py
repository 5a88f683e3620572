"""The compiled CPU runner against the plain forward pass, and against itself in other company.

Two float32 computations in different orders differ by some 1e-7 of their terms; two layers with large weights carry
that to a few 1e-5 of logits near ten. In bfloat16 what goes into a product is rounded to 8 bits; PyTorch rounds
what comes out of each operation as well, so its own deviation from float32 is the bound.
Bitwise equality is asked where the same row is computed in other chunks or beside other rows.
"""

import numpy as np
import pytest
import torch

from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.inference.cpu_runner import CpuRunner
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer

CLOSE = {"rtol": 1e-5, "atol": 6e-5}
NUM_TOKENS = 40
# Rows of a multiple of 32 are streamed for few tokens; sums of more than 256 products are cut into blocks.
SIZES = {
    "small": {"head_dim": 8, "d_model": 24},
    "with edges": {"head_dim": 32, "d_model": 80},
    "in blocks": {"head_dim": 96, "d_model": 64, "d_ff": 301},
}
SPECS = ("dense", "top_k=2", "threshold=0.9", "threshold_top_k=0.9", "top_p=0.6")


def make_model(
    *, attention="moa", activation="gelu", ffn="linear", head_dim=8, d_model=24, d_ff=20, dtype=torch.float32
):
    attentions = {
        "moa": {"kind": "moa", "num_experts": 3, "num_kv_heads": 2, "head_dim": head_dim},
        "gqa": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": head_dim},
    }
    routers = {
        "linear": {"kind": "linear", "gate_scale": 6.0},
        "mlp": {"kind": "mlp", "d_hidden": 8, "gates": "renormalized", "gate_scale": 2.0},
    }
    if ffn == "dense":
        ffn_values = {"kind": "dense", "d_ff": 2 * d_ff, "activation": activation}
    else:
        ffn_values = {"kind": "moe", "num_experts": 6, "d_ff": d_ff, "activation": activation, "router": routers[ffn]}
    config = ModelConfig.model_validate(
        {
            "vocab_size": 270,
            "d_model": d_model,
            "num_layers": 2,
            "max_seq_len": 64,
            "attention": attentions[attention],
            "ffn": ffn_values,
            # Products keep the scale of what goes in, so that absolute tolerances mean something.
            "init_std": 1.5 * d_model**-0.5,
        }
    )
    model = Transformer(config, compute_dtype=dtype)
    initialize(model, config, seed=3)
    for name, parameter in model.named_parameters():
        if not name.endswith(("norm.weight", "router.proj.weight")):
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)


def make_runner(model, **options):
    return CpuRunner(model, num_blocks=16, max_tokens=160, max_seqs=8, num_threads=2, **options)


def make_tokens(num_sequences=2):
    return torch.randint(0, 270, (num_sequences, NUM_TOKENS), generator=torch.Generator().manual_seed(0)).numpy()


def make_batch(chunks, first_positions, block_tables, rules, rule_idxs=None):
    """Return a batch that asks for the logits of every token."""
    starts = np.cumsum([0, *map(len, chunks)]).astype(np.int32)
    return ForwardBatch(
        token_ids_T=np.concatenate(chunks).astype(np.int32),
        query_starts=starts,
        first_positions_B=np.array(first_positions, np.int32),
        block_tables=np.array(block_tables, np.int32),
        rule_idxs_B=np.array(rule_idxs or [0] * len(chunks), np.int32),
        rules=tuple(map(tuple, rules)),
        logits_rows_R=np.arange(starts[-1], dtype=np.int32),
    )


def run_whole(model, tokens, rules, **options):
    tables = [[3 * i + 1, 3 * i, 3 * i + 2] for i in range(len(tokens))]
    batch = make_batch(list(tokens), [0] * len(tokens), tables, [rules])
    return make_runner(model, **options).run(batch).view(len(tokens), NUM_TOKENS, -1)


@pytest.mark.parametrize("attention", ["moa", "gqa"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("ffn", ["linear", "mlp", "dense"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_logits_are_those_of_the_plain_forward_pass(attention, activation, ffn, sizes):
    model = make_model(attention=attention, activation=activation, ffn=ffn, **sizes)
    tokens = make_tokens()
    for spec in SPECS if ffn != "dense" else ("dense",):
        rules = resolve_routing(spec, model.config)
        # The plain pass takes the mean of threshold_top_k over its batch, as fast numerics do over the step.
        found = run_whole(model, tokens, rules, numerics="fast")
        torch.testing.assert_close(found, model(torch.from_numpy(tokens), routing=rules).logits_BSV, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["moa", "gqa"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("spec", SPECS)
def test_a_row_does_not_depend_on_chunks_or_neighbours(dtype, attention, sizes, spec):
    model = make_model(attention=attention, activation="swiglu", dtype=dtype, **sizes)
    rules = resolve_routing(spec, model.config)
    tokens = make_tokens(3)
    whole = run_whole(model, tokens, rules)
    runner, parts, position = make_runner(model), [], 0
    for length in (7, 1, 1, 13, 1, 17):
        chunk = tokens[0][position : position + length]
        # Beside it another sequence is read anew each time.
        batch = make_batch([chunk, tokens[1][: position + 1]], [position, 0], [[4, 2, 9], [5, 6, 7]], [rules])
        parts.append(runner.run(batch)[:length])
        position += length
    assert torch.equal(torch.cat(parts), whole[0])


def test_sequences_of_one_step_follow_their_own_rules():
    model = make_model()
    tokens = make_tokens(3)
    specs = ("top_k=1", "dense", "threshold=0.9")
    rules = [resolve_routing(spec, model.config) for spec in specs]
    tables = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    mixed = make_runner(model).run(make_batch(list(tokens), [0, 0, 0], tables, rules, rule_idxs=[0, 1, 2]))
    for sequence, spec in enumerate(specs):
        alone = run_whole(model, tokens[sequence : sequence + 1], resolve_routing(spec, model.config))
        assert torch.equal(mixed.view(3, NUM_TOKENS, -1)[sequence], alone[0])


@pytest.mark.parametrize("attention", ["moa", "gqa"])
def test_bfloat16_is_closer_to_float32_than_the_plain_forward_pass_in_bfloat16(attention):
    model = make_model(attention=attention, activation="swiglu", head_dim=32, d_model=80, dtype=torch.bfloat16)
    widened = make_model(attention=attention, activation="swiglu", head_dim=32, d_model=80)
    widened.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    rules = resolve_routing("dense", model.config)
    tokens = make_tokens()
    found, expected = run_whole(model, tokens, rules), run_whole(widened, tokens, rules)
    plain = model(torch.from_numpy(tokens), routing=rules).logits_BSV
    assert 0 < (found - expected).norm() < (plain - expected).norm()
