"""Which tensors an artifact holds, under which names and in which shapes. Arithmetic on a config; imports no torch.

Tensors are named as in ``model/transformer.py``, but each FFN expert has its own: ``blocks.3.ffn.experts.w1.00007``.
The numbers are padded because a safetensors file lies in the order of its names: so the experts of a layer lie one
after another, and the wide matrix of all of them is one piece of the file.
"""

import re
from collections.abc import Iterator

from dsmoe_ray.model.config import DenseFfnConfig, GqaConfig, ModelConfig, MoeConfig, RouterConfig

Shape = tuple[int, ...]

_STACKED = re.compile(r"blocks\.\d+\.ffn\.experts\.w[123]")


def model_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return name and shape of every parameter of the model; a shape of a mixture starts with its experts."""
    shapes: dict[str, Shape] = {
        "embedding.weight": (config.vocab_size, config.d_model),
        "norm.weight": (config.d_model,),
    }
    if not config.tie_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.d_model)
    for layer in range(config.num_layers):
        for name, shape in (*_attention_shapes(config), *_ffn_shapes(config)):
            shapes[f"blocks.{layer}.{name}"] = shape
    return shapes


def stored_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return name and shape of every tensor in the files: those of the model, with the FFN experts apart."""
    stored: dict[str, Shape] = {}
    for name, shape in model_shapes(config).items():
        if is_stacked(name):
            stored |= {expert_name(name, expert_id): shape[1:] for expert_id in range(shape[0])}
        else:
            stored[name] = shape
    return stored


def count_stored(config: ModelConfig) -> int:
    """Return how many tensors the files hold, without listing them: a config may ask for absurdly many."""
    if isinstance(config.ffn, DenseFfnConfig):
        per_layer = sum(1 for _ in _ffn_shapes(config))
    else:
        num_matrices = len(expert_matrices(config))
        per_layer = sum(1 for _ in _ffn_shapes(config)) + num_matrices * (config.ffn.num_experts - 1)
    per_layer += sum(1 for _ in _attention_shapes(config))
    return 2 + (not config.tie_embeddings) + config.num_layers * per_layer


def is_stacked(name: str) -> bool:
    """Return whether a parameter of the model holds all FFN experts of a layer."""
    return _STACKED.fullmatch(name) is not None


def expert_name(stacked: str, expert_id: int) -> str:
    """Return the name in the files of one expert's part of a stacked parameter."""
    return f"{stacked}.{expert_id:05d}"


def stacked_name(layer: int, matrix: str) -> str:
    """Return the name of the parameter that holds one matrix (``w1``, ``w2``, ``w3``) of all experts of a layer."""
    return f"blocks.{layer}.ffn.experts.{matrix}"


def expert_matrices(config: ModelConfig) -> tuple[str, ...]:
    """Return the matrices that an FFN expert has; each is ``(d_ff, d_model)``."""
    return ("w1", "w2", "w3") if config.ffn.activation == "swiglu" else ("w1", "w2")


def _attention_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    attention, d_model = config.attention, config.d_model
    yield "attention_norm.weight", (d_model,)
    # Query heads in all for plain attention, those of one expert for a mixture.
    heads: Shape = (attention.num_heads * attention.head_dim,)
    if not isinstance(attention, GqaConfig):
        heads = (attention.num_experts, attention.num_kv_heads * attention.head_dim)
        yield from _router_shapes("attention", attention.router, num_experts=attention.num_experts, d_model=d_model)
    yield "attention.wq", (*heads, d_model)
    yield "attention.wo", (*heads, d_model)
    yield "attention.wk", (attention.num_kv_heads * attention.head_dim, d_model)
    yield "attention.wv", (attention.num_kv_heads * attention.head_dim, d_model)


def _ffn_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    ffn, d_model = config.ffn, config.d_model
    yield "ffn_norm.weight", (d_model,)
    if isinstance(ffn, MoeConfig):
        yield from _router_shapes("ffn", ffn.router, num_experts=ffn.num_experts, d_model=d_model)
    for matrix in expert_matrices(config):
        if isinstance(ffn, MoeConfig):
            yield f"ffn.experts.{matrix}", (ffn.num_experts, ffn.d_ff, d_model)
        else:
            yield f"ffn.{matrix}", (ffn.d_ff, d_model)


def _router_shapes(part: str, router: RouterConfig, *, num_experts: int, d_model: int) -> Iterator[tuple[str, Shape]]:
    if router.d_hidden is not None:
        yield f"{part}.router.hidden.weight", (router.d_hidden, d_model)
    yield f"{part}.router.proj.weight", (num_experts, router.d_hidden or d_model)
