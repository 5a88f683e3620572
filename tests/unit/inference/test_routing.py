"""From what a person asks for to the rules of each layer."""

import pytest

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.model.config import ModelConfig, RoutingConfig
from dsmoe_ray.model.transformer import LayerRouting

TOP_1 = RoutingConfig(mode="top_k", top_k=1)
TOP_3 = RoutingConfig(mode="top_k", top_k=3)


def make_config(ffn_kind="moe", attention_rule=TOP_1) -> ModelConfig:
    router = {"inference": TOP_3.model_dump()}
    ffns = {
        "moe": {"kind": "moe", "num_experts": 4, "d_ff": 8, "router": router},
        "dense": {"kind": "dense", "d_ff": 8},
    }
    attention = {"kind": "moa", "num_experts": 2, "num_kv_heads": 1, "head_dim": 8}
    return ModelConfig.model_validate(
        {
            "vocab_size": 16,
            "d_model": 8,
            "num_layers": 2,
            "max_seq_len": 8,
            "attention": {**attention, "router": {"inference": attention_rule.model_dump()}},
            "ffn": ffns[ffn_kind],
        }
    )


@pytest.mark.parametrize(
    ("spec", "rules"),
    [
        ("deployed", LayerRouting(TOP_1, TOP_3)),
        ("dense", LayerRouting()),
        ("top_k=2", LayerRouting(TOP_1, RoutingConfig(mode="top_k", top_k=2))),
        ("threshold=0.5", LayerRouting(TOP_1, RoutingConfig(mode="threshold", threshold=0.5))),
    ],
)
def test_a_rule_is_for_the_ffn_and_dense_is_for_everything(spec, rules):
    assert resolve_routing(spec, make_config()) == [rules, rules]


@pytest.mark.parametrize(
    ("spec", "ffn_kind", "message"),
    [
        ("top_k=5", "moe", "routing 'top_k=5': top_k must be at most num_experts; got top_k=5, num_experts=4"),
        ("topk=2", "moe", "is not one of dense"),
        ("top_k=2", "dense", "one dense FFN, no experts to choose from. Use dense"),
    ],
)
def test_an_impossible_rule_is_refused(spec, ffn_kind, message):
    with pytest.raises(ConfigError, match=message):
        resolve_routing(spec, make_config(ffn_kind))


def test_a_model_without_ffn_experts_runs_as_deployed():
    assert resolve_routing("deployed", make_config("dense")) == [LayerRouting(TOP_1, RoutingConfig())] * 2
