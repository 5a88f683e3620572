"""Small models of all four stock formats: those of ours that leave, and settings of theirs that come in."""

from typing import Any, NamedTuple

import torch

from dsmoe_ray.artifact.hugging_face.formats import Format
from dsmoe_ray.artifact.layout import model_shapes
from dsmoe_ray.data.tokenizer import TextTokenizer, train_tokenizer
from dsmoe_ray.model.config import ModelConfig, RoutingConfig

VOCAB_SIZE, MAX_SEQ_LEN = 300, 96
THETA = 5000.0
_TEXT = "def add(left, right):\n    return left + right\n\n\n# na\xefve, \u6f22\u5b57\n"


class ExportCase(NamedTuple):
    """A model of ours and how it is written."""

    kind: Format
    config: ModelConfig
    routing: RoutingConfig | None = None
    dtype: torch.dtype = torch.float32
    max_file_bytes: int = 1 << 30


class ImportCase(NamedTuple):
    """A model of theirs and how it is saved."""

    config: dict[str, Any]
    options: dict[str, Any] | None = None
    dtype: str = "float32"


def make_config(*, attention="gqa", gates="renormalized", top_k=2, num_experts=6, **changes) -> ModelConfig:
    inference = {"mode": "dense"} if top_k is None else {"mode": "top_k", "top_k": top_k}
    router = {"kind": "linear", "gates": gates, "gate_scale": 3.0, "inference": inference}
    mixtures = {
        "gqa": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "wide": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        "moa": {"kind": "moa", "num_experts": num_experts, "num_kv_heads": 2, "head_dim": 8, "router": router},
    }
    values = {
        "vocab_size": VOCAB_SIZE,
        "d_model": 32,
        "num_layers": 3,
        "max_seq_len": MAX_SEQ_LEN,
        "attention": mixtures[attention],
        "ffn": {"kind": "moe", "num_experts": num_experts, "d_ff": 16, "activation": "swiglu", "router": router},
        "rope_theta": THETA,
    }
    return ModelConfig.model_validate(values | changes)


def draw_weights(config: ModelConfig):
    """Draw weights that keep activations near one, so that absolute tolerances mean something."""
    generator = torch.Generator().manual_seed(5)
    for name, shape in model_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            yield name, 1.0 + 0.1 * noise
        else:
            # Output projections lie the other way round.
            fan_in = shape[-2] if name.endswith((".wo", ".w2")) else shape[-1]
            yield name, noise * (0.5 if "embedding" in name else fan_in**-0.5)


def make_tokenizer() -> TextTokenizer:
    return train_tokenizer([_TEXT] * 4, vocab_size=VOCAB_SIZE)


DENSE = RoutingConfig()
EXPORTS = {
    "jetmoe": ExportCase(Format.JETMOE, make_config(attention="moa", tie_embeddings=True)),
    "jetmoe, all experts, raw gates": ExportCase(Format.JETMOE, make_config(attention="moa", gates="raw", top_k=None)),
    "granitemoe": ExportCase(Format.GRANITEMOE, make_config(tie_embeddings=True, norm_eps=1e-5)),
    "granitemoe, raw gates, told to run all": ExportCase(Format.GRANITEMOE, make_config(gates="raw"), routing=DENSE),
    "granitemoe, bfloat16": ExportCase(
        Format.GRANITEMOE,
        make_config(ffn=make_config().ffn.model_dump() | {"router": {"gates": "renormalized"}}),
        routing=RoutingConfig(mode="top_k", top_k=3),
        dtype=torch.bfloat16,
    ),
    "mixtral": ExportCase(Format.MIXTRAL, make_config(attention="wide", top_k=3), max_file_bytes=60_000),
    "qwen2_moe": ExportCase(Format.QWEN2_MOE, make_config(gates="raw", norm_eps=1e-5)),
    "qwen2_moe, renormalized gates": ExportCase(Format.QWEN2_MOE, make_config(tie_embeddings=True)),
}

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": MAX_SEQ_LEN,
    # Which of the two is read depends on the version.
    "rope_theta": THETA,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "bos_token_id": None,
    "eos_token_id": None,
}
_GRANITE = _SIZES | {"model_type": "granitemoe", "num_attention_heads": 4, "num_local_experts": 6}
_MIXTRAL = _SIZES | {"model_type": "mixtral", "num_attention_heads": 4, "head_dim": 16, "num_local_experts": 6}
_QWEN2 = _SIZES | {
    "model_type": "qwen2_moe",
    "num_attention_heads": 4,
    "num_experts": 6,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 0,
}
_MULTIPLIERS = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 1.7,
    "logits_scaling": 1.3,
}
# Version 5 holds experts fused; older ones take no notice of the option.
_AS_IN_MEMORY = {"save_original_format": False}
IMPORTS = {
    "a jetmoe": ImportCase(_SIZES | {"model_type": "jetmoe", "kv_channels": 8, "num_local_experts": 6}),
    "a granitemoe": ImportCase(_GRANITE | {"attention_multiplier": 8**-0.5}),
    "a granitemoe with multipliers": ImportCase(_GRANITE | _MULTIPLIERS),
    "a tied granitemoe with multipliers": ImportCase(_GRANITE | _MULTIPLIERS | {"tie_word_embeddings": True}),
    "a bfloat16 granitemoe with multipliers": ImportCase(_GRANITE | _MULTIPLIERS, dtype="bfloat16"),
    "a granitemoe saved as in memory": ImportCase(_GRANITE, options=_AS_IN_MEMORY),
    "a mixtral in many files": ImportCase(_MIXTRAL, options={"max_shard_size": "60KB"}),
    "a float16 mixtral": ImportCase(_MIXTRAL, dtype="float16"),
    "a mixtral saved as in memory": ImportCase(_MIXTRAL, options=_AS_IN_MEMORY),
    "a qwen2_moe": ImportCase(_QWEN2 | {"norm_topk_prob": False}),
    "a qwen2_moe that renormalizes": ImportCase(_QWEN2 | {"norm_topk_prob": True, "qkv_bias": False}),
    "a qwen2_moe saved as in memory": ImportCase(_QWEN2, options=_AS_IN_MEMORY),
}
