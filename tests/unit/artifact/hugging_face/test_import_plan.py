"""What a ``config.json`` of each format means to us, and which are refused."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.artifact.hugging_face.export_plan import plan_export
from dsmoe_ray.artifact.hugging_face.formats import Format
from dsmoe_ray.artifact.hugging_face.import_plan import plan_import
from dsmoe_ray.errors import ArtifactError
from tests.fakes.stock_models import EXPORTS, IMPORTS

STOCK = {
    "jetmoe": IMPORTS["a jetmoe"].config,
    "granitemoe": IMPORTS["a granitemoe"].config,
    "mixtral": IMPORTS["a float16 mixtral"].config,
    "qwen2_moe": IMPORTS["a qwen2_moe"].config,
}


def refusal(kind, **changes):
    with pytest.raises(ArtifactError) as caught:
        plan_import(STOCK[kind] | changes, source="config.json")
    return str(caught.value)


@pytest.mark.parametrize("name", [name for name, case in EXPORTS.items() if case.routing is None])
def test_what_was_exported_comes_back_but_for_the_folded_gate_scale(name):
    config = EXPORTS[name].config
    plan = plan_import(plan_export(config, EXPORTS[name].kind).fields, source="config.json")
    found, expected = plan.model_config.model_dump(), config.model_dump()
    for part in ("attention", "ffn"):
        if "router" in expected[part]:
            # With all experts on, both settings of the gates are one.
            all_on = expected[part]["router"]["inference"]["mode"] == "dense"
            expected[part]["router"] |= {"gate_scale": 1.0}
            if all_on:
                expected[part]["router"] |= {
                    "gates": "renormalized",
                    "inference": found[part]["router"]["inference"] | {"top_k": config.ffn.num_experts},
                }
    assert found == expected
    assert not plan.scales and not plan.folded


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mixtral", {"model_type": "llama"}, "model_type 'llama' is none of jetmoe, granitemoe, mixtral, qwen2_moe"),
        ("mixtral", {"model_type": ["mixtral"]}, "is none of jetmoe"),
        ("mixtral", {"architectures": ["MixtralForTokenClassification"]}, "not MixtralForCausalLM"),
        ("mixtral", {"hidden_act": "gelu"}, "its experts use 'gelu', ours silu"),
        ("jetmoe", {"activation_function": "relu"}, "its experts use 'relu', ours silu"),
        ("mixtral", {"quantization_config": {"bits": 4}}, "its weights are quantized"),
        ("jetmoe", {"auto_map": {"AutoModel": "evil.Model"}}, "names code of its own (auto_map), which is never run"),
        ("mixtral", {"sliding_window": 95}, "sees the last 95 positions only"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64}, "sees the last 64 positions only"),
        ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 64}, "sees the last 64 positions"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 8}, "a shared expert of width 8"),
        ("qwen2_moe", {"decoder_sparse_step": 2}, "not all of its layers are mixtures"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, "not all of its layers are mixtures"),
        ("jetmoe", {"rms_norm_eps": 1e-5}, "its last norm has rms_norm_eps=1e-05"),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "its rotary positions are of a type"),
        ("granitemoe", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "its rotary positions are of a"),
        ("granitemoe", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "its rotary positions are of a"),
        ("mixtral", {"rope_parameters": {"rope_theta": 7.0}}, "rope_theta=5000.0 and rope_parameters disagree"),
        ("mixtral", {"rope_theta": None, "rope_parameters": {"rope_theta": "x"}}, "'x' is not a positive number"),
        ("qwen2_moe", {"num_attention_heads": 5}, "5 heads do not divide hidden_size=32"),
        ("mixtral", {"num_attention_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ("mixtral", {"num_experts_per_tok": 7}, "top_k must be at most num_experts"),
        ("mixtral", {"hidden_size": 0}, "hidden_size: Input should be greater than 0; found 0"),
        ("mixtral", {"hidden_size": "32"}, "hidden_size: Input should be a valid integer"),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings: Input should be a valid boolean"),
        ("granitemoe", {"residual_multiplier": 0.0}, "residual_multiplier: Input should be greater than"),
        ("granitemoe", {"logits_scaling": math.inf}, "logits_scaling: Input should be"),
        ("mixtral", {"head_dim": 10**400}, "head_dim: Input should be less than"),
    ],
)
def test_what_our_layers_do_not_compute_is_refused_with_the_reason(kind, changes, reason):
    assert reason in refusal(kind, **changes)


def test_a_missing_size_is_named():
    values = {name: value for name, value in STOCK["mixtral"].items() if name != "num_local_experts"}
    with pytest.raises(ArtifactError, match="num_local_experts: Field required"):
        plan_import(values, source="config.json")


def test_all_reasons_are_told_at_once():
    message = refusal("mixtral", hidden_act="gelu", sliding_window=4, quantization_config={})
    assert message.count(";") >= 2


@pytest.mark.parametrize(
    ("kind", "theta"), [("mixtral", 1e6), ("granitemoe", 1e4), ("jetmoe", 1e4), ("qwen2_moe", 1e4)]
)
def test_without_a_theta_it_is_the_formats_own(kind, theta):
    values = STOCK[kind] | {"rope_theta": None, "rope_parameters": None}
    assert plan_import(values, source="config.json").model_config.rope_theta == theta


def test_theta_is_read_in_the_form_of_either_version():
    for changes in ({"rope_parameters": None}, {"rope_theta": None}):
        assert plan_import(STOCK["mixtral"] | changes, source="config.json").model_config.rope_theta == 5000.0


def test_a_window_as_long_as_the_longest_sequence_changes_nothing():
    assert plan_import(STOCK["mixtral"] | {"sliding_window": 96}, source="config.json").model_config.max_seq_len == 96
    unused = {"use_sliding_window": False, "sliding_window": 4}
    assert plan_import(STOCK["qwen2_moe"] | unused, source="config.json").model_config.max_seq_len == 96


def test_multipliers_of_granitemoe_are_folded_and_told():
    multipliers = {
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.24,
        "logits_scaling": 8.0,
    }
    plan = plan_import(STOCK["granitemoe"] | multipliers, source="config.json")
    assert plan.kind is Format.GRANITEMOE
    assert plan.scales == pytest.approx({"attention.wq": 8**0.5 / 64, "attention.wo": 0.02, "norm.weight": 0.125})
    assert plan.model_config.ffn.router.gate_scale == pytest.approx(0.02)
    assert plan.model_config.norm_eps == pytest.approx(1e-6 / 144)
    assert [sentence.split("=")[0] for sentence in plan.folded] == [
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = sorted({key for config in STOCK.values() for key in config} | {"rope_scaling", "sliding_window", "layer_types"})


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(sorted(STOCK)), changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
def test_any_values_are_held_or_refused(kind, changes):
    try:
        plan_import(STOCK[kind] | changes, source="config.json")
    except ArtifactError as error:
        assert str(error)
