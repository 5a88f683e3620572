"""Prefill and decode with a KV cache give what one forward pass over the whole sequence gives.

Float32. Both ways compute the same sums over other shapes, and so in another order: each differs from the true value by
some 1e-7 of the terms, which two layers and logits of size ten carry to about 1e-5.
"""

import pytest
import torch

from dsmoe_ray.data.tokenizer import train_tokenizer
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.kv_cache import ContiguousKvCache
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer

CLOSE = {"rtol": 1e-5, "atol": 3e-5}
NUM_TOKENS = 20
ROUTINGS = pytest.mark.parametrize("routing", ["dense", "top_k=2", "threshold=0.9", "top_p=0.6"])


def make_model(*, attention="moa", activation="gelu", router="linear") -> Transformer:
    attentions = {
        "moa": {"kind": "moa", "num_experts": 3, "num_kv_heads": 2, "head_dim": 8},
        "gqa": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    }
    routers = {"linear": {"kind": "linear"}, "mlp": {"kind": "mlp", "d_hidden": 8, "gates": "renormalized"}}
    config = ModelConfig.model_validate(
        {
            "vocab_size": 270,
            "d_model": 24,
            "num_layers": 2,
            "max_seq_len": 32,
            "attention": attentions[attention],
            "ffn": {
                "kind": "moe",
                "num_experts": 6,
                "d_ff": 8,
                "activation": activation,
                "router": {**routers[router], "gate_scale": 6.0},
            },
            "init_std": 0.3,
        }
    )
    model = Transformer(config)
    initialize(model, config, seed=3)
    return model.requires_grad_(False)


def random_tokens(batch_size, num_tokens=NUM_TOKENS):
    return torch.randint(0, 270, (batch_size, num_tokens), generator=torch.Generator().manual_seed(0))


@ROUTINGS
@pytest.mark.parametrize(
    "shape",
    [
        {"attention": "moa", "activation": "gelu", "router": "mlp"},
        {"attention": "gqa", "activation": "swiglu", "router": "linear"},
    ],
    ids=["moa-gelu-mlp", "gqa-swiglu-linear"],
)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "steps", [[7] + [1] * 13, [5, 4, 11], [1] * 20], ids=["prefill and decode", "chunks", "decode"]
)
def test_logits_of_every_position_are_those_of_the_whole_forward_pass(shape, routing, batch_size, steps):
    model = make_model(**shape)
    rules = resolve_routing(routing, model.config)
    tokens_BS = random_tokens(batch_size)
    whole = model(tokens_BS, routing=rules)
    if routing != "dense":
        selected = torch.stack([decision.selected_TE for decision in whole.ffn_routings])
        assert selected.any() and not selected.all()
    cache = ContiguousKvCache(model.config, max_len=NUM_TOKENS, batch_size=batch_size)
    parts = [model(part, routing=rules, cache=cache).logits_BSV for part in tokens_BS.split(steps, dim=1)]
    assert cache.num_cached == NUM_TOKENS
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.logits_BSV, **CLOSE)


@ROUTINGS
def test_greedy_tokens_are_the_most_likely_ones_of_repeated_whole_forward_passes(routing):
    model = make_model()
    rules = resolve_routing(routing, model.config)
    sequence = [5, 6, 7]
    for _ in range(NUM_TOKENS):
        logits_V = model(torch.tensor([sequence]), routing=rules).logits_BSV[0, -1]
        sequence.append(int(logits_V.argmax()))
    engine = Engine(model, train_tokenizer(["text"], vocab_size=270))
    # The end-of-text token would end the sequence early.
    assert engine.tokenizer.end_of_text_id not in sequence
    generated = list(engine.generate_tokens(sequence[:3], max_tokens=NUM_TOKENS, routing=rules))
    assert generated == sequence[3:]
    assert len(set(generated)) > 3


def test_a_wrong_entry_in_the_cache_shows():
    """The comparison above would notice a cache that loses a position."""
    model = make_model()
    tokens_BS = random_tokens(1)
    cache = ContiguousKvCache(model.config, max_len=NUM_TOKENS)
    model(tokens_BS[:, :-1], cache=cache)
    cache._k_LBGMd[0, :, :, 3] = 0.0
    found = model(tokens_BS[:, -1:], cache=cache).logits_BSV
    expected = model(tokens_BS, last_logits_only=True).logits_BSV
    assert (found - expected).abs().max() > 100 * CLOSE["atol"]
