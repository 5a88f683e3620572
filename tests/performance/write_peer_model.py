"""Write a bench model with random weights as a directory in the GraniteMoe format, float32, for the peers to load.

python tests/performance/write_peer_model.py OUT [--workload granite_191m] [--seed 0]
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))

from dsmoe_ray.bench.engine_workloads import ENGINE_WORKLOADS
from dsmoe_ray.model.init import draw_initial
from dsmoe_ray.model.transformer import Transformer


def build_config(model):
    """Return the config.json of a model of plain attention and gated experts."""
    head_dim = model.attention.head_dim
    return {
        "architectures": ["GraniteMoeForCausalLM"],
        "model_type": "granitemoe",
        "dtype": "float32",
        "torch_dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.ffn.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_heads,
        "num_key_value_heads": model.attention.num_kv_heads,
        "num_local_experts": model.ffn.num_experts,
        "num_experts_per_tok": model.ffn.router.inference.top_k,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_multiplier": head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": None,
        "pad_token_id": None,
        "use_cache": True,
    }


def convert_weights(named):
    """Return the tensors by GraniteMoe's names; ``named`` gives a tensor of ours by name."""
    tensors = {"model.embed_tokens.weight": named["embedding.weight"], "model.norm.weight": named["norm.weight"]}
    layer = 0
    while f"blocks.{layer}.attention.wq" in named:
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        attention, experts = ours + "attention.", ours + "ffn.experts."
        tensors |= {
            theirs + "input_layernorm.weight": named[ours + "attention_norm.weight"],
            theirs + "post_attention_layernorm.weight": named[ours + "ffn_norm.weight"],
            theirs + "self_attn.q_proj.weight": named[attention + "wq"],
            theirs + "self_attn.k_proj.weight": named[attention + "wk"],
            theirs + "self_attn.v_proj.weight": named[attention + "wv"],
            theirs + "self_attn.o_proj.weight": named[attention + "wo"].t().contiguous(),
            theirs + "block_sparse_moe.router.layer.weight": named[ours + "ffn.router.proj.weight"],
            theirs + "block_sparse_moe.input_linear.weight": torch.cat(
                [named[experts + "w1"], named[experts + "w3"]], dim=1
            ),
            theirs + "block_sparse_moe.output_linear.weight": named[experts + "w2"].transpose(1, 2).contiguous(),
        }
        layer += 1
    return tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--workload", default="granite_191m")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = ENGINE_WORKLOADS[arguments.workload].model
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
    named = {name: draw_initial(name, shape, config, seed=arguments.seed) for name, shape in shapes.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(convert_weights(named), arguments.out / "model.safetensors", metadata={"format": "pt"})
    (arguments.out / "config.json").write_text(json.dumps(build_config(config), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
