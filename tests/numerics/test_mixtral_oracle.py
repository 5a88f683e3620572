"""Our layers and models against ``transformers``' own, with the same weights, in float32.

These are oracles that we did not write: Mixtral (renormalized gates), Qwen2-MoE (raw gates) and JetMoE (attention
experts). Two float32 computations in different orders agree to about 1e-6 of the values' scale, which is near one here;
1e-5 is the bound for outputs and logits, taken absolutely. Gradients are sums over all tokens of numbers up to ten, so
they get 1e-4 of the largest entry.
"""

import pytest
import torch

from dsmoe_ray.model.config import ModelConfig, RoutingConfig
from dsmoe_ray.model.layer_routing import LayerRouting
from dsmoe_ray.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "max_position_embeddings": 32}
NUM_EXPERTS, D_FF, HEAD_DIM, THETA, EPS = 6, 16, 8, 5000.0, 1e-6
ROPE = {"rope_type": "default", "rope_theta": THETA}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def make_mixtral(top_k):
    config = transformers.MixtralConfig(
        **SIZES,
        intermediate_size=D_FF,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
        rms_norm_eps=EPS,
        rope_parameters=ROPE,
        **EAGER,
    )
    return fill(transformers.MixtralForCausalLM(config))


def make_qwen2_moe(top_k):
    config = transformers.Qwen2MoeConfig(
        **SIZES,
        moe_intermediate_size=D_FF,
        shared_expert_intermediate_size=8,
        num_attention_heads=3,
        num_key_value_heads=1,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
        norm_topk_prob=False,
        qkv_bias=False,
        rms_norm_eps=EPS,
        rope_parameters=ROPE,
        **EAGER,
    )
    model = fill(transformers.Qwen2MoeForCausalLM(config))
    with torch.no_grad():
        # We have no shared expert; theirs can only be silenced.
        for layer in model.model.layers:
            layer.mlp.shared_expert.down_proj.weight.zero_()
    return model


def make_jetmoe(top_k):
    config = transformers.JetMoeConfig(
        **SIZES,
        num_key_value_heads=2,
        kv_channels=HEAD_DIM,
        intermediate_size=D_FF,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=top_k,
        rms_norm_eps=EPS,
        rope_parameters=ROPE,
        attn_implementation="eager",
    )
    model = fill(transformers.JetMoeForCausalLM(config))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.bias.zero_()
            layer.self_attention.experts.bias.zero_()
    return model


def fill(model):
    """Draw weights that keep activations near one, so that absolute tolerances mean something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(1.0 + 0.1 * noise)
            else:
                parameter.copy_(noise * (1.0 if "embed" in name else parameter.shape[-1] ** -0.5))
    return model.eval()


def make_ours(theirs, *, attention, gates, top_k, tie_embeddings=False):
    inference = {"mode": "top_k", "top_k": top_k}
    router = {"kind": "linear", "gates": gates, "inference": inference}
    if attention["kind"] == "moa":
        attention = {**attention, "router": router}
    config = ModelConfig.model_validate(
        {
            "vocab_size": SIZES["vocab_size"],
            "d_model": SIZES["hidden_size"],
            "num_layers": SIZES["num_hidden_layers"],
            "max_seq_len": SIZES["max_position_embeddings"],
            "attention": attention,
            "ffn": {"kind": "moe", "num_experts": NUM_EXPERTS, "d_ff": D_FF, "activation": "swiglu", "router": router},
            "rope_theta": THETA,
            "norm_eps": EPS,
            "tie_embeddings": tie_embeddings,
        }
    )
    model = Transformer(config)
    model.load_state_dict(to_our_weights(theirs.state_dict(), tied=tie_embeddings))
    return model


def to_our_weights(theirs, *, tied):
    ours = {"embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    if not tied:
        ours["head.weight"] = theirs["lm_head.weight"]
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        source = {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if name.startswith(prefix)}
        block = jetmoe_block(source) if "mlp.router.layer.weight" in source else mixtral_block(source)
        ours |= {f"blocks.{layer}.{name}": tensor for name, tensor in block.items()}
    return ours


def mixtral_block(source):
    w1, w3 = source["mlp.experts.gate_up_proj"].chunk(2, dim=1)
    return {
        "attention_norm.weight": source["input_layernorm.weight"],
        "ffn_norm.weight": source["post_attention_layernorm.weight"],
        "attention.wq": source["self_attn.q_proj.weight"],
        "attention.wk": source["self_attn.k_proj.weight"],
        "attention.wv": source["self_attn.v_proj.weight"],
        "attention.wo": source["self_attn.o_proj.weight"].T,
        "ffn.router.proj.weight": source["mlp.gate.weight"],
        "ffn.experts.w1": w1,
        "ffn.experts.w3": w3,
        "ffn.experts.w2": source["mlp.experts.down_proj"].transpose(1, 2),
    }


def jetmoe_block(source):
    w1, w3 = source["mlp.input_linear.weight"].chunk(2, dim=1)
    wk, wv = source["self_attention.kv_proj.weight"].chunk(2)
    return {
        "attention_norm.weight": source["input_layernorm.weight"],
        "ffn_norm.weight": source["post_attention_layernorm.weight"],
        "attention.wq": source["self_attention.experts.input_linear.weight"],
        "attention.wk": wk,
        "attention.wv": wv,
        "attention.wo": source["self_attention.experts.output_linear.weight"].transpose(1, 2),
        "attention.router.proj.weight": source["self_attention.experts.router.layer.weight"],
        "ffn.router.proj.weight": source["mlp.router.layer.weight"],
        "ffn.experts.w1": w1,
        "ffn.experts.w3": w3,
        "ffn.experts.w2": source["mlp.output_linear.weight"].transpose(1, 2),
    }


MIXTRAL_ATTENTION = {"kind": "gqa", "num_heads": 6, "num_kv_heads": 2, "head_dim": HEAD_DIM}
QWEN2_ATTENTION = {"kind": "gqa", "num_heads": 3, "num_kv_heads": 1, "head_dim": HEAD_DIM}
JETMOE_ATTENTION = {"kind": "moa", "num_experts": NUM_EXPERTS, "num_kv_heads": 2, "head_dim": HEAD_DIM}


def our_rules(model, top_k):
    """Rules for every layer; with all experts on, the dense path, which takes no rule."""
    if top_k == NUM_EXPERTS:
        return None
    rule = RoutingConfig(mode="top_k", top_k=top_k)
    attention = rule if model.config.attention.kind == "moa" else RoutingConfig()
    return [LayerRouting(attention, rule)] * model.config.num_layers


def compare_blocks(theirs, ours, top_k):
    """Outputs and gradients of one FFN mixture on random tokens."""
    x_BSD = torch.randn(2, 9, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    rule = RoutingConfig() if top_k == NUM_EXPERTS else RoutingConfig(mode="top_k", top_k=top_k)
    x_ours, x_theirs = x_BSD.clone().requires_grad_(), x_BSD.clone().requires_grad_()
    found, _ = ours.blocks[1].ffn(x_ours, rule)
    expected = theirs.model.layers[1].mlp(x_theirs)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert expected.abs().mean() > 0.05, "too small for the tolerance to mean anything"
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = {name: weight.grad for name, weight in ours.blocks[1].ffn.named_parameters()}
    mlp = theirs.model.layers[1].mlp
    w1, w3 = mlp.experts.gate_up_proj.grad.chunk(2, dim=1)
    assert_close_to_scale(x_ours.grad, x_theirs.grad)
    assert_close_to_scale(gradients["router.proj.weight"], mlp.gate.weight.grad)
    assert_close_to_scale(gradients["experts.w1"], w1)
    assert_close_to_scale(gradients["experts.w3"], w3)
    assert_close_to_scale(gradients["experts.w2"], mlp.experts.down_proj.grad.transpose(1, 2))


def assert_close_to_scale(found, expected):
    # With one renormalized gate, which is always 1, the router's gradient is rounding noise around zero.
    torch.testing.assert_close(found, expected, rtol=0.0, atol=max(1e-4 * expected.abs().max().item(), 1e-5))


def compare_logits(theirs, ours, top_k):
    tokens_BS = torch.randint(SIZES["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs(tokens_BS).logits
        found = ours(tokens_BS, routing=our_rules(ours, top_k)).logits_BSV
    assert expected.std() > 0.3, "too small for the tolerance to mean anything"
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("top_k", [NUM_EXPERTS, 3, 2, 1])
def test_renormalized_experts_are_mixtrals(top_k):
    theirs = make_mixtral(top_k)
    ours = make_ours(theirs, attention=MIXTRAL_ATTENTION, gates="renormalized", top_k=top_k)
    compare_blocks(theirs, ours, top_k)


@pytest.mark.parametrize("top_k", [NUM_EXPERTS, 2])
def test_a_whole_renormalized_model_is_mixtral(top_k):
    """Grouped-query attention, rotations by halves, norms and head, besides the experts."""
    theirs = make_mixtral(top_k)
    ours = make_ours(theirs, attention=MIXTRAL_ATTENTION, gates="renormalized", top_k=top_k)
    compare_logits(theirs, ours, top_k)


@pytest.mark.parametrize("top_k", [NUM_EXPERTS, 2])
def test_raw_experts_and_the_whole_model_are_qwen2_moes(top_k):
    theirs = make_qwen2_moe(top_k)
    ours = make_ours(theirs, attention=QWEN2_ATTENTION, gates="raw", top_k=top_k)
    compare_blocks(theirs, ours, top_k)
    compare_logits(theirs, ours, top_k)


@pytest.mark.parametrize("top_k", [NUM_EXPERTS, 2])
def test_a_model_with_attention_experts_is_jetmoe(top_k):
    theirs = make_jetmoe(top_k)
    ours = make_ours(theirs, attention=JETMOE_ATTENTION, gates="renormalized", top_k=top_k, tie_embeddings=True)
    compare_logits(theirs, ours, top_k)


def test_raw_and_renormalized_gates_differ_where_experts_are_dropped():
    """Otherwise the oracles above could not tell the two settings apart."""
    theirs = make_mixtral(2)
    raw = make_ours(theirs, attention=MIXTRAL_ATTENTION, gates="raw", top_k=2)
    with pytest.raises(AssertionError):
        compare_logits(theirs, raw, 2)
