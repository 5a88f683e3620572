"""What the benches of the inference engine generate with: model shapes and requests. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsmoe_ray.bench.workloads import QUICKSTART
from dsmoe_ray.model.config import ModelConfig


@dataclass(frozen=True)
class EngineWorkload:
    """A model and the batches of requests it is measured with."""

    model: ModelConfig
    batch_sizes: Sequence[int] = (1, 8, 32)
    num_prompt_tokens: int = 128
    num_output_tokens: int = 64
    fits_in_cache: bool = False
    """Its weights stay in a processor's cache, so that bytes read from memory say nothing about its speed."""

    @property
    def num_positions(self) -> int:
        """Longest sequence, prompt and output together."""
        return self.num_prompt_tokens + self.num_output_tokens

    def make_prompts(self, batch_size: int, *, seed: int) -> list[list[int]]:
        """Return prompts of random tokens, the same for every engine."""
        generator = np.random.default_rng(seed)
        return generator.integers(0, self.model.vocab_size, size=(batch_size, self.num_prompt_tokens)).tolist()


QUICKSTART_ENGINE = EngineWorkload(QUICKSTART.model, fits_in_cache=True)
"""The model of ``examples/quickstart.yaml``."""


def _make_granite(
    *, vocab_size: int, d_model: int, num_layers: int, num_heads: int, d_ff: int, top_k: int
) -> ModelConfig:
    """Return a model in the terms of GraniteMoe, which other engines run: 32 experts and 4 KV heads of 64."""
    return ModelConfig.model_validate(
        {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "num_layers": num_layers,
            "max_seq_len": 1024,
            "tie_embeddings": True,
            # At the usual 0.02 the embedding outweighs all layers of a model that is not trained, and every sequence
            # repeats one token; at this it wanders, and its routing with it.
            "init_std": 0.06,
            "attention": {"kind": "gqa", "num_heads": num_heads, "num_kv_heads": 4, "head_dim": 64},
            "ffn": {
                "kind": "moe",
                "num_experts": 32,
                "d_ff": d_ff,
                "activation": "swiglu",
                "router": {
                    "kind": "linear",
                    "gates": "renormalized",
                    "inference": {"mode": "top_k", "top_k": top_k},
                },
            },
        }
    )


GRANITE_191M = EngineWorkload(
    _make_granite(vocab_size=8192, d_model=1024, num_layers=12, num_heads=16, d_ff=128, top_k=8)
)
"""191 million parameters, far more than a cache holds, in many narrow experts."""

GRANITE_224M = EngineWorkload(
    _make_granite(vocab_size=32768, d_model=512, num_layers=8, num_heads=8, d_ff=512, top_k=4), batch_sizes=(8,)
)
"""224 million parameters: the shape at which other servers are measured over HTTP."""

ENGINE_WORKLOADS = {"quickstart": QUICKSTART_ENGINE, "granite_191m": GRANITE_191M, "granite_224m": GRANITE_224M}
