"""What a model config refuses, with a message that says what to change, and the twin it derives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dsmoe_ray.config_io import config_digest
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.model.config import GqaConfig, MoaConfig, ModelConfig, MoeConfig, RouterConfig, RoutingConfig

VALUES = {
    "vocab_size": 50,
    "d_model": 16,
    "num_layers": 2,
    "max_seq_len": 8,
    "attention": {"kind": "moa", "num_experts": 4, "num_kv_heads": 2, "head_dim": 6},
    "ffn": {"kind": "moe", "num_experts": 8, "d_ff": 12, "activation": "swiglu"},
    "tie_embeddings": True,
    "rope_theta": 500.0,
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "top_k"}, "needs top_k"),
        ({"mode": "threshold"}, "needs threshold"),
        ({"mode": "threshold_top_k", "top_k": 2}, "threshold"),
        ({"mode": "top_p"}, "needs top_p"),
        ({"mode": "top_p", "top_p": 1.5}, "less than or equal to 1"),
        ({"mode": "top_p", "top_p": 0.0}, "greater than 0"),
        ({"mode": "top_k", "top_k": 0}, "greater than 0"),
        ({"mode": "dense", "top_k": 2}, "does not use top_k=2"),
        ({"mode": "top_k", "top_k": 2, "threshold": 0.5}, "does not use threshold=0.5"),
        ({"mode": "per_layer_top_k"}, "needs per_layer_top_k"),
        ({"mode": "per_layer_top_k", "per_layer_top_k": []}, "at least 1 item"),
        ({"mode": "per_layer_top_k", "per_layer_top_k": [True, 2]}, "valid integer"),
        ({"mode": "top_k", "top_k": 2, "per_layer_top_k": [2, 2]}, r"does not use per_layer_top_k=\(2, 2\)"),
    ],
)
def test_a_routing_rule_has_what_it_needs_and_nothing_else(values, message):
    with pytest.raises(ValidationError, match=message):
        RoutingConfig.model_validate(values)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("dense", {"mode": "dense"}),
        ("top_k=8", {"mode": "top_k", "top_k": 8}),
        ("threshold=0.48", {"mode": "threshold", "threshold": 0.48}),
        ("threshold_top_k=1", {"mode": "threshold_top_k", "threshold": 1.0}),
        ("top_p=0.9", {"mode": "top_p", "top_p": 0.9}),
    ],
)
def test_a_rule_is_written_as_on_the_command_line(spec, values):
    rule = RoutingConfig.model_validate(values)
    assert RoutingConfig.parse(spec) == rule
    assert rule.to_spec() == spec


@settings(deadline=None)
@given(st.floats(0.0, 1e9))
def test_a_written_rule_reads_back_to_the_same_number(value):
    rule = RoutingConfig(mode="threshold", threshold=value)
    assert RoutingConfig.parse(rule.to_spec()) == rule


@pytest.mark.parametrize("spec", ["", "top_k", "top_k=", "top_k=two", "top_k=0", "dense=1", "best=3", "top_p=2", "=3"])
def test_what_is_no_rule_is_refused_by_its_text(spec):
    with pytest.raises(ConfigError, match=f"routing {spec!r}"):
        RoutingConfig.parse(spec)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"mode": "top_k", "top_k": 9}, "top_k=9, num_experts=8"),
        ({"mode": "threshold", "threshold": 8.0}, "threshold=8.0, num_experts=8"),
        ({"mode": "per_layer_top_k", "per_layer_top_k": [2, 9]}, "got 9 in layer 1, num_experts=8"),
    ],
    ids=["top_k", "threshold", "per_layer_top_k"],
)
def test_a_mixture_refuses_a_rule_that_it_cannot_follow(rule, message):
    with pytest.raises(ValidationError, match=message):
        MoeConfig.model_validate(VALUES["ffn"] | {"router": {"inference": rule}})
    with pytest.raises(ValidationError, match=message):
        MoaConfig.model_validate(VALUES["attention"] | {"num_experts": 8, "router": {"inference": rule}})


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_table_of_layers_has_one_number_for_each(part):
    def with_table(*table):
        router = {"router": {"inference": {"mode": "per_layer_top_k", "per_layer_top_k": list(table)}}}
        return ModelConfig.model_validate(VALUES | {part: VALUES[part] | router})

    rule = getattr(with_table(3, 1), part).router.inference
    assert [rule.at_layer(layer).to_spec() for layer in range(2)] == ["top_k=3", "top_k=1"]
    for table in ((3,), (3, 1, 2)):
        with pytest.raises(ValidationError, match=f"got {len(table)}, num_layers=2"):
            with_table(*table)


def test_a_rule_without_a_table_is_that_of_every_layer():
    rule = RoutingConfig(mode="threshold", threshold=0.5)
    assert rule.at_layer(7) is rule


@pytest.mark.parametrize("mode", ["python", "json"])
def test_only_a_rule_with_a_table_is_written_with_one(mode):
    """Digests of configurations that were saved before there were tables must stay what they are."""
    names = ["mode", "top_k", "threshold", "top_p"]
    assert list(RoutingConfig(mode="top_k", top_k=2).model_dump(mode=mode)) == names
    table = RoutingConfig(mode="per_layer_top_k", per_layer_top_k=(2, 1))
    assert list(table.model_dump(mode=mode)) == [*names, "per_layer_top_k"]
    assert RoutingConfig.model_validate(table.model_dump(mode=mode)) == table


def test_a_digest_is_the_one_that_configurations_had_before_there_were_tables():
    found = config_digest(ModelConfig.model_validate(VALUES))
    assert found == "d355fdb3654732c476d541e67bd85f3805798525d9b0794ec7ef2d6badd6c986"


def test_the_hidden_width_of_a_router_goes_with_its_kind():
    for values in ({"kind": "mlp"}, {"kind": "linear", "d_hidden": 8}):
        with pytest.raises(ValidationError, match="d_hidden"):
            RouterConfig.model_validate(values)


def test_heads_must_fit_rotations_and_groups():
    with pytest.raises(ValidationError, match="even"):
        MoaConfig.model_validate(VALUES["attention"] | {"head_dim": 5})
    with pytest.raises(ValidationError, match="multiple of num_kv_heads"):
        GqaConfig(kind="gqa", num_heads=6, num_kv_heads=4, head_dim=8)


def test_the_dense_twin_has_equal_shape_and_no_mixture():
    twin = ModelConfig.model_validate(VALUES).dense_twin()
    assert twin.attention.model_dump() == {"kind": "gqa", "num_heads": 8, "num_kv_heads": 2, "head_dim": 6}
    assert twin.ffn.model_dump() == {"kind": "dense", "d_ff": 96, "activation": "swiglu"}
    assert (twin.d_model, twin.rope_theta, twin.tie_embeddings) == (16, 500.0, True)
    assert twin.dense_twin() == twin
    # It must be a config that a file could hold.
    assert ModelConfig.model_validate(twin.model_dump()) == twin
