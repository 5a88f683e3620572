"""What a model config refuses, with a message that says what to change, and the twin it derives."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

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
    ],
    ids=["top_k", "threshold"],
)
def test_a_mixture_refuses_a_rule_that_it_cannot_follow(rule, message):
    with pytest.raises(ValidationError, match=message):
        MoeConfig.model_validate(VALUES["ffn"] | {"router": {"inference": rule}})
    with pytest.raises(ValidationError, match=message):
        MoaConfig.model_validate(VALUES["attention"] | {"num_experts": 8, "router": {"inference": rule}})


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
