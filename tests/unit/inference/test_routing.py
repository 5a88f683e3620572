"""From what a person asks for to the rules of each layer."""

import pytest

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.inference.routing import name_routing, resolve_routing
from dsmoe_ray.model.config import ModelConfig, RoutingConfig
from dsmoe_ray.model.layer_routing import LayerRouting, deployed_routing

TOP_1 = RoutingConfig(mode="top_k", top_k=1)
TOP_3 = RoutingConfig(mode="top_k", top_k=3)


def make_config(ffn_kind="moe", attention_kind="moa", attention_rule=TOP_1, ffn_rule=TOP_3) -> ModelConfig:
    router = {"inference": ffn_rule.model_dump()}
    ffns = {
        "moe": {"kind": "moe", "num_experts": 4, "d_ff": 8, "router": router},
        "dense": {"kind": "dense", "d_ff": 8},
    }
    attention_router = {"inference": attention_rule.model_dump()}
    sizes = {"kind": attention_kind, "num_kv_heads": 1, "head_dim": 8}
    attentions = {"moa": {**sizes, "num_experts": 2, "router": attention_router}, "gqa": {**sizes, "num_heads": 2}}
    return ModelConfig.model_validate(
        {
            "vocab_size": 16,
            "d_model": 8,
            "num_layers": 2,
            "max_seq_len": 8,
            "attention": attentions[attention_kind],
            "ffn": ffns[ffn_kind],
        }
    )


TABLE = RoutingConfig(mode="per_layer_top_k", per_layer_top_k=(1, 3))
THRESHOLD = RoutingConfig(mode="threshold", threshold=0.5)
TOP_2 = RoutingConfig(mode="top_k", top_k=2)
DENSE = RoutingConfig()


@pytest.mark.parametrize(
    ("spec", "rules"),
    [
        ("deployed", LayerRouting(TOP_1, TOP_3)),
        (" dense ", LayerRouting()),
        ("top_k=2", LayerRouting(TOP_1, TOP_2)),
        ("threshold=0.5", LayerRouting(TOP_1, THRESHOLD)),
        ("ffn:top_k=2", LayerRouting(TOP_1, TOP_2)),
        ("ffn:dense", LayerRouting(TOP_1, DENSE)),
        ("attention:top_k=2", LayerRouting(TOP_2, TOP_3)),
        ("attention:dense", LayerRouting(DENSE, TOP_3)),
        ("attention:dense/ffn:dense", LayerRouting()),
        (" ffn : threshold=0.5 / attention : top_k=2 ", LayerRouting(TOP_2, THRESHOLD)),
    ],
)
def test_a_rule_is_for_the_ffn_and_dense_for_everything_unless_parts_are_named(spec, rules):
    assert resolve_routing(spec, make_config()) == [rules, rules]


@pytest.mark.parametrize("spec", ["per_layer_top_k=1,3", "ffn:per_layer_top_k=1,3", "deployed"])
def test_a_table_becomes_the_plain_top_k_of_each_layer(spec):
    config = make_config(ffn_rule=TABLE if spec == "deployed" else TOP_2)
    assert resolve_routing(spec, config) == [LayerRouting(TOP_1, TOP_1), LayerRouting(TOP_1, TOP_3)]
    if spec == "deployed":
        assert deployed_routing(config) == resolve_routing(spec, config)


def test_attention_takes_a_table_as_well():
    rules = resolve_routing("attention:per_layer_top_k=2,1", make_config())
    assert rules == [LayerRouting(TOP_2, TOP_3), LayerRouting(TOP_1, TOP_3)]


@pytest.mark.parametrize(
    ("spec", "kinds", "message"),
    [
        ("top_k=5", {}, "routing 'top_k=5': top_k must be at most num_experts; got top_k=5, num_experts=4"),
        ("topk=2", {}, "is not one of dense"),
        ("top_k=2", {"ffn_kind": "dense"}, "one dense FFN, no experts to choose from. Use dense"),
        ("attention:top_k=2", {"attention_kind": "gqa"}, "plain attention, no experts to choose from. Use dense"),
        ("attention:top_k=3", {}, "got top_k=3, num_experts=2"),
        ("per_layer_top_k=1", {}, "one number for each layer; got 1, num_layers=2"),
        ("per_layer_top_k=1,5", {}, "got 5 in layer 1, num_experts=4"),
        ("ffn:top_k=2/router:top_k=2", {}, "'router:top_k=2' is not attention:RULE or ffn:RULE"),
        ("attention:dense/top_k=2", {}, "'top_k=2' is not attention:RULE or ffn:RULE"),
        ("ffn:top_k=2/ffn:top_k=2", {}, "gives ffn twice; keep one"),
        ("ffn:deployed", {}, "routing 'deployed' is not one of dense"),
    ],
)
def test_an_impossible_rule_is_refused(spec, kinds, message):
    with pytest.raises(ConfigError, match=message):
        resolve_routing(spec, make_config(**kinds))


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ({"attention_rule": DENSE}, "top_k=3"),
        ({"attention_rule": DENSE, "ffn_rule": TABLE}, "per_layer_top_k=1,3"),
        ({"ffn_rule": TABLE}, "attention:top_k=1/ffn:per_layer_top_k=1,3"),
    ],
)
def test_the_deployed_setting_has_a_name_that_reads_back_to_it(rules, name):
    config = make_config(**rules)
    assert name_routing("deployed", config) == name
    assert resolve_routing(name, config) == deployed_routing(config)


def test_any_other_setting_is_called_what_a_person_wrote():
    assert name_routing(" attention:dense/ffn:top_k=2 ", make_config()) == "attention:dense/ffn:top_k=2"


def test_a_model_without_ffn_experts_runs_as_deployed():
    assert resolve_routing("deployed", make_config("dense")) == [LayerRouting(TOP_1, RoutingConfig())] * 2
