"""A published model that was never trained: small enough to run a test in milliseconds."""

from pathlib import Path

import torch

from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.data.tokenizer import TextTokenizer, train_tokenizer
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import draw_initial
from dsmoe_ray.model.transformer import Transformer

NUM_EXPERTS, TOP_K = 4, 2
TEXT = "def add(left, right):\n    return left + right\n\n\n# na\xefve, \u6f22\u5b57\n"


def make_config(**changes) -> ModelConfig:
    router = {"kind": "linear", "gate_scale": 4.0, "inference": {"mode": "top_k", "top_k": TOP_K}}
    values = {
        "vocab_size": 300,
        "d_model": 16,
        "num_layers": 2,
        "max_seq_len": 32,
        "attention": {"kind": "moa", "num_experts": 2, "num_kv_heads": 1, "head_dim": 8},
        "ffn": {"kind": "moe", "num_experts": NUM_EXPERTS, "d_ff": 8, "router": router},
        # Large weights, so that tokens differ in likelihood and experts in what they do.
        "init_std": 0.3,
    }
    return ModelConfig.model_validate(values | changes)


def make_tokenizer(config: ModelConfig) -> TextTokenizer:
    return train_tokenizer([TEXT] * 4, vocab_size=config.vocab_size)


def write_tiny_artifact(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    chat_template: str | None = None,
    generation_config: dict | None = None,
    **changes,
) -> Path:
    config = make_config(**changes)
    tokenizer = make_tokenizer(config)
    shapes = {name: parameter.shape for name, parameter in Transformer(config).named_parameters()}
    save_artifact(
        directory,
        model_config=config,
        tensors=((name, draw_initial(name, shape, config, seed=1)) for name, shape in shapes.items()),
        tokenizer_json=tokenizer.to_json(),
        provenance={"run": "tiny"},
        eos_token_id=tokenizer.end_of_text_id,
        chat_template=chat_template,
        generation_config=generation_config,
        dtype=dtype,
    )
    return directory
