"""The four stock formats and where their tensors lie: names and shapes only; imports no torch.

A ``Move`` pairs one tensor of theirs with the parameters of ours that it holds, so that one table serves both ways.
Parameters of ours that share a tensor lie one below the other along the second last axis; ``{expert}`` in a name stands
for one tensor per expert.
"""

import math
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

from dsmoe_ray.artifact.layout import Shape, model_shapes
from dsmoe_ray.model.config import GqaConfig, ModelConfig


class Format(StrEnum):
    """A model type of ``transformers`` that our models can be written as."""

    JETMOE = "jetmoe"
    GRANITEMOE = "granitemoe"
    MIXTRAL = "mixtral"
    QWEN2_MOE = "qwen2_moe"


MODEL_CLASSES = {
    Format.JETMOE: "JetMoeForCausalLM",
    Format.GRANITEMOE: "GraniteMoeForCausalLM",
    Format.MIXTRAL: "MixtralForCausalLM",
    Format.QWEN2_MOE: "Qwen2MoeForCausalLM",
}


class Move(NamedTuple):
    """One tensor of theirs, or one per expert, and what it holds of ours."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    """Theirs has the last two axes the other way round."""

    def names(self, shapes: Mapping[str, Shape]) -> list[str]:
        """Return the names of their tensors, one per expert where they are apart."""
        if "{expert}" not in self.theirs:
            return [self.theirs]
        return [self.theirs.replace("{expert}", str(expert)) for expert in range(shapes[self.ours[0]][0])]

    def their_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the shape of each of their tensors."""
        shape = shapes[self.ours[0]]
        if len(shape) > 1:
            shape = (*shape[:-2], sum(shapes[name][-2] for name in self.ours), shape[-1])
        if self.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        return shape[1:] if "{expert}" in self.theirs else shape


Layout = tuple[Move, ...]

_NORMS = (
    Move("input_layernorm.weight", ("attention_norm.weight",)),
    Move("post_attention_layernorm.weight", ("ffn_norm.weight",)),
)
_GQA = (
    *_NORMS,
    Move("self_attn.q_proj.weight", ("attention.wq",)),
    Move("self_attn.k_proj.weight", ("attention.wk",)),
    Move("self_attn.v_proj.weight", ("attention.wv",)),
    Move("self_attn.o_proj.weight", ("attention.wo",), transposed=True),
)
_MOA = (
    *_NORMS,
    Move("self_attention.kv_proj.weight", ("attention.wk", "attention.wv")),
    Move("self_attention.experts.router.layer.weight", ("attention.router.proj.weight",)),
    Move("self_attention.experts.input_linear.weight", ("attention.wq",)),
    Move("self_attention.experts.output_linear.weight", ("attention.wo",), transposed=True),
)


def _fused_experts(*, router: str, up: str, down: str) -> Layout:
    return (
        Move(router, ("ffn.router.proj.weight",)),
        Move(up, ("ffn.experts.w1", "ffn.experts.w3")),
        Move(down, ("ffn.experts.w2",), transposed=True),
    )


def _single_experts(*, router: str, experts: str, w1: str, w2: str, w3: str) -> Layout:
    return (
        Move(router, ("ffn.router.proj.weight",)),
        Move(f"{experts}.{{expert}}.{w1}.weight", ("ffn.experts.w1",)),
        Move(f"{experts}.{{expert}}.{w2}.weight", ("ffn.experts.w2",), transposed=True),
        Move(f"{experts}.{{expert}}.{w3}.weight", ("ffn.experts.w3",)),
    )


# The first is what every version of transformers reads, and what we write. The others are the names that version 5 has
# in memory and may be told to save.
_LAYERS: dict[Format, tuple[Layout, ...]] = {
    Format.JETMOE: (
        _MOA
        + _fused_experts(
            router="mlp.router.layer.weight", up="mlp.input_linear.weight", down="mlp.output_linear.weight"
        ),
    ),
    Format.GRANITEMOE: (
        _GQA
        + _fused_experts(
            router="block_sparse_moe.router.layer.weight",
            up="block_sparse_moe.input_linear.weight",
            down="block_sparse_moe.output_linear.weight",
        ),
        _GQA
        + _fused_experts(
            router="block_sparse_moe.router.weight",
            up="block_sparse_moe.experts.gate_up_proj",
            down="block_sparse_moe.experts.down_proj",
        ),
    ),
    Format.MIXTRAL: (
        _GQA
        + _single_experts(
            router="block_sparse_moe.gate.weight", experts="block_sparse_moe.experts", w1="w1", w2="w2", w3="w3"
        ),
        _GQA + _fused_experts(router="mlp.gate.weight", up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj"),
    ),
    Format.QWEN2_MOE: (
        _GQA
        + _single_experts(
            router="mlp.gate.weight", experts="mlp.experts", w1="gate_proj", w2="down_proj", w3="up_proj"
        ),
        _GQA + _fused_experts(router="mlp.gate.weight", up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj"),
    ),
}


def num_layouts(kind: Format) -> int:
    """Return in how many ways a format names its tensors; the first is the one to write."""
    return len(_LAYERS[kind])


def first_names(kind: Format, layout: int) -> set[str]:
    """Return the names in a layout of the first layer's tensors, of experts those of the first."""
    return {f"model.layers.0.{move.theirs.replace('{expert}', '0')}" for move in _LAYERS[kind][layout]}


def iterate_moves(kind: Format, config: ModelConfig, *, layout: int = 0) -> Iterator[Move]:
    """Return every tensor of the model in a format, the trunk's first, then layer by layer."""
    yield Move("model.embed_tokens.weight", ("embedding.weight",))
    yield Move("model.norm.weight", ("norm.weight",))
    if not config.tie_embeddings:
        yield Move("lm_head.weight", ("head.weight",))
    for layer in range(config.num_layers):
        for move in _LAYERS[kind][layout]:
            ours = tuple(f"blocks.{layer}.{name}" for name in move.ours)
            yield Move(f"model.layers.{layer}.{move.theirs}", ours, move.transposed)


def count_tensors(kind: Format, config: ModelConfig, *, layout: int = 0) -> int:
    """Return how many tensors ``iterate_moves`` leads to, without listing them: a config may ask for absurdly many."""
    num_experts = getattr(config.ffn, "num_experts", 1)
    per_layer = sum(num_experts if "{expert}" in move.theirs else 1 for move in _LAYERS[kind][layout])
    return 2 + (not config.tie_embeddings) + config.num_layers * per_layer


def their_shapes(kind: Format, config: ModelConfig, *, layout: int = 0) -> dict[str, Shape]:
    """Return name and shape of every tensor of the model in a format."""
    shapes = model_shapes(config)
    return {
        name: move.their_shape(shapes)
        for move in iterate_moves(kind, config, layout=layout)
        for name in move.names(shapes)
    }


def filler_shapes(kind: Format, config: ModelConfig) -> dict[str, Shape]:
    """Return tensors that a format has and our models have not, all zero or empty, so that they change nothing."""
    d_model, fillers = config.d_model, dict[str, Shape]()
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        if kind is Format.JETMOE:
            fillers |= {f"{prefix}mlp.bias": (d_model,), f"{prefix}self_attention.experts.bias": (d_model,)}
        if kind is Format.QWEN2_MOE:
            fillers |= _attention_biases(prefix, config)
            fillers |= {
                f"{prefix}mlp.shared_expert.gate_proj.weight": (0, d_model),
                f"{prefix}mlp.shared_expert.up_proj.weight": (0, d_model),
                f"{prefix}mlp.shared_expert.down_proj.weight": (d_model, 0),
                f"{prefix}mlp.shared_expert_gate.weight": (1, d_model),
            }
    return fillers


def optional_shapes(kind: Format, config: ModelConfig) -> dict[str, Shape]:
    """Return tensors that a model in a format may have besides its own, and that must be zero for us to hold it."""
    optional = filler_shapes(kind, config)
    if kind is Format.GRANITEMOE:
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            optional |= _attention_biases(prefix, config) | {f"{prefix}self_attn.o_proj.bias": (config.d_model,)}
    return optional


def _attention_biases(prefix: str, config: ModelConfig) -> dict[str, Shape]:
    attention = config.attention
    assert isinstance(attention, GqaConfig)
    query, key = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    sizes = {"q_proj": query, "k_proj": key, "v_proj": key}
    return {f"{prefix}self_attn.{name}.bias": (size,) for name, size in sizes.items()}


def find_scale(name: str, scales: Mapping[str, float]) -> float:
    """Return the factor of a parameter of ours; a key is its name, or the end of it from a dot on."""
    return next((factor for end, factor in scales.items() if name == end or name.endswith(f".{end}")), 1.0)


def is_power_of_two(factor: float) -> bool:
    """Return whether multiplying by a factor moves exponents only, so that no digit of a weight is lost."""
    return math.frexp(factor)[0] == 0.5
