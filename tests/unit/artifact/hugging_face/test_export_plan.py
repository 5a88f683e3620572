"""What fits which stock format, why not otherwise, and what changes."""

import pytest

from dsmoe_ray.artifact.hugging_face.export_plan import find_obstacles, plan_export
from dsmoe_ray.artifact.hugging_face.formats import Format
from dsmoe_ray.errors import ArtifactError
from dsmoe_ray.model.config import DenseFfnConfig, ModelConfig, RoutingConfig
from tests.fakes.stock_models import make_config

GQA_FORMATS = [Format.GRANITEMOE, Format.MIXTRAL, Format.QWEN2_MOE]


def change(config, part, **settings):
    """Derive a model with other settings of a mixture; those of its router are told by the key ``router``."""
    values = config.model_dump()
    router = values[part].get("router", {}) | settings.pop("router", {})
    values[part] |= settings | {"router": router}
    return ModelConfig.model_validate(values)


def possible(config, routing=None):
    return {kind for kind in Format if not find_obstacles(config, kind, routing)}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(make_config(), set(GQA_FORMATS), id="renormalized"),
        pytest.param(make_config(gates="raw"), {Format.QWEN2_MOE}, id="raw"),
        pytest.param(make_config(gates="raw", top_k=None), set(GQA_FORMATS), id="raw, all on"),
        pytest.param(make_config(attention="wide"), {Format.MIXTRAL}, id="wide heads"),
        pytest.param(make_config(attention="moa"), {Format.JETMOE}, id="attention experts"),
        pytest.param(make_config(attention="moa", gates="raw"), set(), id="attention experts, raw"),
        pytest.param(make_config(attention="moa", gates="raw", top_k=None), {Format.JETMOE}, id="the same, all on"),
        pytest.param(make_config(attention="moa", norm_eps=1e-5), set(), id="another eps with attention experts"),
        pytest.param(make_config(norm_eps=1e-5), set(GQA_FORMATS), id="another eps"),
    ],
)
def test_the_formats_that_hold_a_model(config, expected):
    assert possible(config) == expected


@pytest.mark.parametrize(
    ("config", "kind", "reason", "nearest"),
    [
        pytest.param(
            change(make_config(), "ffn", activation="gelu"), "mixtral", "FFN experts are gelu", "none", id="gelu"
        ),
        pytest.param(
            change(make_config(), "ffn", router={"kind": "mlp", "d_hidden": 8}),
            "mixtral",
            "FFN router is of kind mlp",
            "none",
            id="mlp router",
        ),
        pytest.param(make_config(gates="raw"), "mixtral", "FFN gates are raw", "qwen2_moe", id="raw gates"),
        pytest.param(
            make_config(attention="moa", gates="raw"),
            "jetmoe",
            "attention gates are raw",
            "none as it is routed; jetmoe with --routing dense",
            id="raw gates of attention",
        ),
        pytest.param(make_config(attention="moa"), "mixtral", "its attention is a mixture", "jetmoe", id="moa"),
        pytest.param(make_config(), "jetmoe", "its attention is plain", "granitemoe or mixtral or qwen2_moe", id="gqa"),
        pytest.param(
            make_config(attention="wide"), "granitemoe", r"num_heads \* head_dim is 64", "mixtral", id="wide heads"
        ),
        pytest.param(
            change(make_config(attention="moa"), "attention", num_experts=3),
            "jetmoe",
            "3 attention and 6 FFN experts",
            "none",
            id="expert counts",
        ),
        pytest.param(
            make_config(attention="moa", norm_eps=1e-5), "jetmoe", "norm_eps is 1e-05", "none", id="eps of jetmoe"
        ),
        pytest.param(
            make_config(ffn=DenseFfnConfig(kind="dense", d_ff=8).model_dump()),
            "mixtral",
            "FFN is dense",
            "none",
            id="dense",
        ),
        pytest.param(
            change(make_config(), "ffn", router={"inference": {"mode": "threshold", "threshold": 0.48}}),
            "mixtral",
            r"not threshold=0\.48: add --routing top_k=K or dense",
            "none as it is routed; granitemoe or mixtral or qwen2_moe with --routing dense",
            id="threshold",
        ),
        pytest.param(
            make_config().with_ffn_routing(RoutingConfig(mode="per_layer_top_k", per_layer_top_k=(1, 2, 3))),
            "qwen2_moe",
            "not per_layer_top_k=1,2,3: add --routing top_k=K or dense",
            "none as it is routed; granitemoe or mixtral or qwen2_moe with --routing dense",
            id="table of layers",
        ),
    ],
)
def test_a_refusal_tells_the_reason_and_the_nearest_format(config, kind, reason, nearest):
    with pytest.raises(ArtifactError, match=rf"{kind} cannot hold this model: .*{reason}.*format: {nearest}[.;]"):
        plan_export(config, Format(kind))


def test_all_reasons_are_told_at_once():
    config = change(make_config(attention="wide", gates="raw"), "ffn", activation="gelu")
    assert len(find_obstacles(config, Format.GRANITEMOE, None)) == 3


def test_more_experts_than_there_are_cannot_be_asked_for():
    with pytest.raises(ArtifactError, match="top_k=7 is more than its 6 FFN experts"):
        plan_export(make_config(), Format.MIXTRAL, routing=RoutingConfig(mode="top_k", top_k=7))


@pytest.mark.parametrize(
    ("inference", "routing", "changes"),
    [
        pytest.param({"mode": "top_k", "top_k": 2}, None, [], id="as deployed"),
        pytest.param({"mode": "dense"}, None, [], id="all on"),
        pytest.param(
            {"mode": "top_k", "top_k": 2},
            RoutingConfig(mode="top_k", top_k=3),
            ["ffn: the artifact deploys top_k=2, the mixtral model runs top_k=3 of 6 experts"],
            id="another k",
        ),
        pytest.param(
            {"mode": "threshold", "threshold": 0.5},
            RoutingConfig(),
            ["ffn: the artifact deploys threshold=0.5, the mixtral model runs top_k=6 of 6 experts"],
            id="threshold",
        ),
    ],
)
def test_a_change_of_routing_is_told(inference, routing, changes):
    config = change(make_config(), "ffn", router={"inference": inference})
    assert plan_export(config, Format.MIXTRAL, routing=routing).routing_changes == changes


def test_attention_that_is_deployed_all_on_is_told_to_be_cut_in_a_jetmoe():
    config = change(make_config(attention="moa"), "attention", router={"inference": {"mode": "dense", "top_k": None}})
    plan = plan_export(config, Format.JETMOE)
    assert plan.routing_changes == ["attention: the artifact deploys dense, the jetmoe model runs top_k=2 of 6 experts"]


@pytest.mark.parametrize("kind", GQA_FORMATS)
def test_rotary_positions_are_told_to_old_and_new_versions(kind):
    fields = plan_export(make_config(), kind).fields
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 5000.0


def test_the_gate_scale_is_folded_where_there_is_one():
    assert plan_export(make_config(), Format.MIXTRAL).scales == {"ffn.experts.w2": 3.0}
    both = plan_export(make_config(attention="moa"), Format.JETMOE).scales
    assert both == {"ffn.experts.w2": 3.0, "attention.wo": 3.0}
    assert not plan_export(change(make_config(), "ffn", router={"gate_scale": 1.0}), Format.MIXTRAL).scales
