"""Initial values: their table, and that nothing but the seed and the name decides them."""

import math

import pytest
import torch

from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import draw_initial, initialize
from dsmoe_ray.model.transformer import Transformer

MLP = {"kind": "mlp", "d_hidden": 48}
CONFIG = ModelConfig.model_validate(
    {
        "vocab_size": 300,
        "d_model": 64,
        "num_layers": 2,
        "max_seq_len": 8,
        "attention": {"kind": "moa", "num_experts": 4, "num_kv_heads": 2, "head_dim": 16, "router": MLP},
        "ffn": {"kind": "moe", "num_experts": 8, "d_ff": 32, "activation": "swiglu", "router": MLP},
        "init_std": 0.03,
    }
)
TWIN = CONFIG.dense_twin()


@pytest.mark.parametrize("config", [CONFIG, TWIN], ids=["mixture", "dense"])
def test_every_parameter_has_the_deviation_its_table_says(config):
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        value = draw_initial(name, parameter.shape, config, seed=3)
        assert (value.shape, value.dtype) == (parameter.shape, torch.float32)
        if "norm" in name:
            assert torch.equal(value, torch.ones(64))
            continue
        output = name.split(".")[-1] in ("wo", "w2")
        std = 0.03 / math.sqrt(4) if output else 0.03
        # The deviation of n draws is off by 1/sqrt(2 n); four of those, and four of 1/sqrt(n) for the mean.
        assert value.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * value.numel())), name
        assert abs(value.mean().item()) < 4 * std / math.sqrt(value.numel()), name


def test_values_depend_on_seed_and_name_and_on_nothing_drawn_before():
    shape = torch.Size([6, 5])
    first = draw_initial("blocks.0.ffn.w1", shape, CONFIG, seed=0)
    torch.manual_seed(123)
    torch.randn(7)
    state = torch.get_rng_state()
    assert torch.equal(draw_initial("blocks.0.ffn.w1", shape, CONFIG, seed=0), first)
    assert torch.equal(torch.get_rng_state(), state)
    others = [("blocks.1.ffn.w1", 0), ("blocks.0.ffn.w3", 0), ("blocks.0.ffn.w1", 1)]
    for name, seed in others:
        assert not torch.equal(draw_initial(name, shape, CONFIG, seed=seed), first)


def test_a_model_is_filled_with_the_same_values_whatever_the_order():
    models = [Transformer(CONFIG) for _ in range(2)]
    initialize(models[0], CONFIG, seed=7)
    with torch.no_grad():
        for name, parameter in reversed(list(models[1].named_parameters())):
            parameter.copy_(draw_initial(name, parameter.shape, CONFIG, seed=7))
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two), name


def test_no_two_parameters_start_equal():
    model = Transformer(CONFIG)
    initialize(model, CONFIG, seed=7)
    firsts = [parameter.flatten()[0].item() for name, parameter in model.named_parameters() if "norm" not in name]
    assert len(set(firsts)) == len(firsts)
