"""Counts against the paper's figures, against real modules and against PyTorch's own FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsmoe_ray.model.accounting import (
    KeptExperts,
    compute_decode_bytes,
    compute_forward_flops,
    compute_training_flops,
    count_kept,
    count_parameters,
    mean_causal_context,
)
from dsmoe_ray.model.config import ModelConfig, RoutingConfig
from dsmoe_ray.model.transformer import Transformer

LINEAR = {"kind": "linear"}
MLP = {"kind": "mlp", "d_hidden": 24}


def make_model(*, attention="moa", ffn="moe", activation="gelu", router=LINEAR, tie_embeddings=False) -> ModelConfig:
    attentions = {
        "moa": {"kind": "moa", "num_experts": 4, "num_kv_heads": 2, "head_dim": 8, "router": router},
        "gqa": {"kind": "gqa", "num_heads": 8, "num_kv_heads": 2, "head_dim": 8},
    }
    ffns = {
        "moe": {"kind": "moe", "num_experts": 6, "d_ff": 16, "activation": activation, "router": router},
        "dense": {"kind": "dense", "d_ff": 96, "activation": activation},
    }
    return ModelConfig.model_validate(
        {
            "vocab_size": 80,
            "d_model": 32,
            "num_layers": 3,
            "max_seq_len": 16,
            "tie_embeddings": tie_embeddings,
            "attention": attentions[attention],
            "ffn": ffns[ffn],
        }
    )


def make_paper_model(
    d_model: int, num_layers: int, attention: tuple[int, int, int], ffn: tuple[int, int]
) -> ModelConfig:
    num_experts, num_kv_heads, head_dim = attention
    router = {"kind": "mlp", "d_hidden": 512}
    return ModelConfig.model_validate(
        {
            "vocab_size": 50304,
            "d_model": d_model,
            "num_layers": num_layers,
            "max_seq_len": 2048,
            "attention": {
                "kind": "moa",
                "num_experts": num_experts,
                "num_kv_heads": num_kv_heads,
                "head_dim": head_dim,
                "router": router,
            },
            "ffn": {"kind": "moe", "num_experts": ffn[0], "d_ff": ffn[1], "router": router},
        }
    )


PAPER = [
    pytest.param(make_paper_model(2048, 24, (16, 2, 64), (32, 256)), 1067e6, 1067e6, 1017e6, id="1B"),
    pytest.param(make_paper_model(3072, 28, (8, 4, 96), (32, 384)), 2793e6, 2846e6, 2705e6, id="3B"),
    pytest.param(make_paper_model(4096, 36, (8, 4, 128), (32, 512)), 6338e6, 6343e6, 6186e6, id="6B"),
]

SHAPES = [
    pytest.param({}, id="moa and moe"),
    pytest.param({"router": MLP, "activation": "swiglu"}, id="mlp routers, swiglu"),
    pytest.param({"attention": "gqa", "tie_embeddings": True}, id="gqa, tied"),
    pytest.param({"attention": "gqa", "ffn": "dense"}, id="dense"),
    pytest.param({"ffn": "dense", "activation": "swiglu", "router": MLP}, id="moa, dense swiglu"),
]


@pytest.mark.parametrize(("config", "at_least", "at_most", "twin"), PAPER)
def test_the_papers_totals_are_met_within_half_a_percent(config, at_least, at_most, twin):
    total = count_parameters(config).non_embedding
    assert at_least * 0.995 <= total <= at_most * 1.005
    assert count_parameters(config.dense_twin()).non_embedding == pytest.approx(twin, rel=0.005)


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_equal_those_of_the_built_model(shape):
    config = make_model(**shape)
    with torch.device("meta"):
        model = Transformer(config)
    counts = count_parameters(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    routers = sum(parameter.numel() for name, parameter in model.named_parameters() if "router" in name)
    assert (counts.norms, counts.routers) == (norms, routers)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_flops_equal_pytorchs_count(shape):
    config = make_model(**shape)
    seq_len = 16
    with torch.device("meta"):
        model = Transformer(config)
        tokens_BS = torch.zeros(2, seq_len, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(tokens_BS)
    # PyTorch counts attention without its causal half: every query meets every key.
    expected = compute_forward_flops(config, context_tokens=seq_len)
    assert counter.get_total_flops() / tokens_BS.numel() == expected


def test_fewer_experts_leave_keys_values_routers_and_norms_in_use():
    config = make_model()
    used = count_parameters(config, kept=KeptExperts(attention=1, ffn=1.5))
    everything = count_parameters(config)
    assert (used.routers, used.norms, used.embedding) == (everything.routers, everything.norms, everything.embedding)
    kv, per_expert = 2 * 32 * 16, 2 * 32 * 16
    assert used.attention == 3 * (kv + per_expert)
    assert used.ffn == everything.ffn / 6 * 1.5


def test_keeping_every_expert_is_the_whole_model():
    config = make_model(router=MLP)
    kept = KeptExperts(
        attention=count_kept(RoutingConfig(), 4), ffn=count_kept(RoutingConfig(mode="top_k", top_k=6), 6)
    )
    assert count_parameters(config, kept=kept) == count_parameters(config)
    assert compute_forward_flops(config, context_tokens=9, kept=kept) == compute_forward_flops(config, context_tokens=9)


def test_what_a_threshold_keeps_is_left_to_data():
    assert count_kept(RoutingConfig(mode="threshold", threshold=0.48), 32) is None
    assert count_kept(RoutingConfig(mode="top_p", top_p=0.5), 32) is None


def test_a_causal_token_sees_half_the_sequence_on_average():
    assert mean_causal_context(5) == sum(range(1, 6)) / 5


def test_training_costs_three_forward_passes_and_full_recomputation_one_more_without_the_head():
    config = make_model()
    forward = compute_forward_flops(config, context_tokens=8.5)
    plain = compute_training_flops(config, seq_len=16)
    full = compute_training_flops(config, seq_len=16, activation_checkpointing="full")
    selective = compute_training_flops(config, seq_len=16, activation_checkpointing="selective")
    assert plain == 3 * forward
    assert full == 4 * forward - 2 * 80 * 32
    assert plain < selective < full


def test_decode_reads_each_used_weight_once_and_the_whole_cache():
    config = make_model(tie_embeddings=True)
    kept = KeptExperts(ffn=2)
    weights = count_parameters(config, kept=kept).non_embedding + 80 * 32 + 32
    cache = 3 * 2 * 2 * 8 * 10
    read = compute_decode_bytes(config, context_tokens=10, kept=kept, weight_bytes=2, cache_bytes=4)
    assert read == 2 * weights + 4 * cache
