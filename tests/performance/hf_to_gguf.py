"""Write a GraniteMoe directory as one GGUF file. Needs numpy and gguf only.

Norms and routers stay float32 in a bfloat16 file, as they do with llama.cpp's own converter.

    python tests/performance/hf_to_gguf.py HF_DIR OUT.gguf float32|bfloat16
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

_ARCHITECTURE = "granitemoe"


def read_tensors(path):
    """Yield (name, float32 array) of a safetensors file of float32 tensors."""
    with path.open("rb") as file:
        header_length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_length))
    data = np.memmap(path, mode="r", offset=8 + header_length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} is {entry['dtype']}; write the model as float32")
        start, end = entry["data_offsets"]
        yield name, data[start:end].view(np.float32).reshape(entry["shape"])


def interleave_halves(weight, num_heads):
    """Reorder the rows of each head from (all first parts, all second parts) of rotary pairs to pair after pair."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def convert(name, tensor, config):
    """Return llama.cpp's tensors, by name, that one tensor of GraniteMoe becomes."""
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    if name in whole:
        return {f"{whole[name]}.weight": tensor}
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    block = f"blk.{layer}."
    if part == "block_sparse_moe.input_linear.weight":
        gate, up = np.split(tensor, 2, axis=1)
        return {block + "ffn_gate_exps.weight": gate, block + "ffn_up_exps.weight": up}
    if part == "self_attn.q_proj.weight":
        tensor = interleave_halves(tensor, config["num_attention_heads"])
    if part == "self_attn.k_proj.weight":
        tensor = interleave_halves(tensor, config["num_key_value_heads"])
    return {block + _PARTS[part] + ".weight": tensor}


_PARTS = {
    "input_layernorm.weight": "attn_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "self_attn.q_proj.weight": "attn_q",
    "self_attn.k_proj.weight": "attn_k",
    "self_attn.v_proj.weight": "attn_v",
    "self_attn.o_proj.weight": "attn_output",
    "block_sparse_moe.router.layer.weight": "ffn_gate_inp",
    "block_sparse_moe.output_linear.weight": "ffn_down_exps",
}


def add_sizes(writer, config):
    """Write the model's sizes and the constants of GraniteMoe, and a vocabulary of nothing but its length."""
    writer.add_name("bench")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def write_gguf(source, out, dtype):
    """Write the file; a reader never sees half of it."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, _ARCHITECTURE)
    add_sizes(writer, config)
    writer.add_file_type({"float32": gguf.LlamaFileType.ALL_F32, "bfloat16": gguf.LlamaFileType.MOSTLY_BF16}[dtype])
    for path in sorted(source.glob("*.safetensors")):
        for name, tensor in read_tensors(path):
            for new_name, values in convert(name, tensor, config).items():
                narrow = dtype == "bfloat16" and values.ndim > 1 and "ffn_gate_inp" not in new_name
                kind = gguf.GGMLQuantizationType.BF16 if narrow else gguf.GGMLQuantizationType.F32
                whole = np.ascontiguousarray(values)
                writer.add_tensor(new_name, gguf.quants.quantize(whole, kind) if narrow else whole, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(out)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
