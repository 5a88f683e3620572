"""Whether and how a model can be written in a stock format: a pure decision about configurations.

A format is possible when it computes the same function with the same weights. What it cannot hold is an obstacle; all
of them are told, with the format that comes nearest. Routing that the artifact deploys and a format cannot run (a
threshold, all attention experts on) is no obstacle once a person knows: it is told as a change.
"""

from dataclasses import dataclass
from typing import Any

from dsmoe_ray.artifact.hugging_face.formats import MODEL_CLASSES, Format
from dsmoe_ray.errors import ArtifactError
from dsmoe_ray.model.config import (
    GqaConfig,
    MoaConfig,
    ModelConfig,
    MoeConfig,
    RouterConfig,
    RoutingConfig,
    RoutingMode,
)

_JETMOE_NORM_EPS = 1e-6
_DENSE = RoutingConfig()


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """How a model is written in a format."""

    kind: Format
    top_k: int
    """Experts that the exported model runs per token, in every layer."""
    fields: dict[str, Any]
    """Of ``config.json``, without special tokens and types."""
    scales: dict[str, float]
    """Factors of parameters of ours; see ``find_scale``."""
    routing_changes: list[str]
    """Where the exported model routes otherwise than the artifact deploys, one sentence each."""


def plan_export(config: ModelConfig, kind: Format, *, routing: RoutingConfig | None = None) -> ExportPlan:
    """Decide how a model is written in a format.

    Args:
        config: The model.
        kind: The format.
        routing: Experts per token of the exported model, ``top_k`` or ``dense``; by default as the FFN is deployed.

    Raises:
        ArtifactError: the format cannot hold the model; tells all reasons and the nearest format that can.
    """
    obstacles = find_obstacles(config, kind, routing)
    if obstacles:
        reasons = "; ".join(obstacles)
        raise ArtifactError(f"{kind} cannot hold this model: {reasons}. {_find_nearest(config, kind, routing)}")
    ffn = config.ffn
    assert isinstance(ffn, MoeConfig)
    top_k = _find_top_k(ffn, routing)
    assert top_k is not None
    scales = {"ffn.experts.w2": ffn.router.gate_scale}
    if isinstance(config.attention, MoaConfig):
        scales["attention.wo"] = config.attention.router.gate_scale
    return ExportPlan(
        kind=kind,
        top_k=top_k,
        fields=_to_fields(config, kind, top_k),
        scales={name: factor for name, factor in scales.items() if factor != 1.0},
        routing_changes=_find_changes(config, kind, top_k),
    )


def find_obstacles(config: ModelConfig, kind: Format, routing: RoutingConfig | None) -> list[str]:
    """Return every reason why a format cannot hold a model; none if it can."""
    ffn = config.ffn
    if not isinstance(ffn, MoeConfig):
        return ["its FFN is dense, and the format has experts"]
    obstacles = []
    if ffn.activation != "swiglu":
        obstacles.append(f"its FFN experts are {ffn.activation}, the format's are swiglu")
    if ffn.router.kind != "linear":
        obstacles.append(f"its FFN router is of kind {ffn.router.kind}, the format's is linear")
    top_k = _find_top_k(ffn, routing)
    if top_k is None:
        rule = (routing or ffn.router.inference).to_spec()
        obstacles.append(f"every format runs one top_k in all layers, not {rule}: add --routing top_k=K or dense")
    elif top_k > ffn.num_experts:
        obstacles.append(f"top_k={top_k} is more than its {ffn.num_experts} FFN experts")
    if kind is Format.JETMOE:
        return obstacles + _find_jetmoe_obstacles(config, ffn, top_k)
    return obstacles + _find_gqa_obstacles(config, ffn, kind, top_k)


def _find_jetmoe_obstacles(config: ModelConfig, ffn: MoeConfig, top_k: int | None) -> list[str]:
    obstacles = []
    if config.norm_eps != _JETMOE_NORM_EPS:
        obstacles.append(f"its norm_eps is {config.norm_eps}, the format's layers have {_JETMOE_NORM_EPS}")
    attention = config.attention
    if isinstance(attention, GqaConfig):
        return [*obstacles, "its attention is plain (gqa), the format's is a mixture (moa)"]
    if attention.num_experts != ffn.num_experts:
        obstacles.append(
            f"it has {attention.num_experts} attention and {ffn.num_experts} FFN experts, the format one number of both"
        )
    if attention.router.kind != "linear":
        obstacles.append(f"its attention router is of kind {attention.router.kind}, the format's is linear")
    obstacles += _find_gate_obstacles("attention", attention.router, attention.num_experts, top_k)
    return obstacles + _find_gate_obstacles("FFN", ffn.router, ffn.num_experts, top_k)


def _find_gqa_obstacles(config: ModelConfig, ffn: MoeConfig, kind: Format, top_k: int | None) -> list[str]:
    attention = config.attention
    if not isinstance(attention, GqaConfig):
        return ["its attention is a mixture (moa), the format's is plain (gqa)"]
    obstacles = []
    width = attention.num_heads * attention.head_dim
    # Mixtral alone has the width of a head as a setting of its own in all versions.
    if kind is not Format.MIXTRAL and width != config.d_model:
        obstacles.append(f"its num_heads * head_dim is {width}, the format wants d_model, which is {config.d_model}")
    if kind is not Format.QWEN2_MOE:
        obstacles += _find_gate_obstacles("FFN", ffn.router, ffn.num_experts, top_k)
    return obstacles


def _find_gate_obstacles(part: str, router: RouterConfig, num_experts: int, top_k: int | None) -> list[str]:
    if router.gates == "renormalized" or top_k in (None, num_experts):
        return []
    return [f"its {part} gates are raw, the format's renormalized, which differs unless all experts are on"]


def _find_nearest(config: ModelConfig, refused: Format, routing: RoutingConfig | None) -> str:
    """Return a sentence with the formats that are possible, if need be with all experts on."""
    possible = [kind.value for kind in Format if kind is not refused and not find_obstacles(config, kind, routing)]
    if possible:
        return f"Nearest possible format: {' or '.join(possible)}."
    dense = [kind.value for kind in Format if not find_obstacles(config, kind, _DENSE)]
    if dense:
        return f"Nearest possible format: none as it is routed; {' or '.join(dense)} with --routing dense."
    return "Nearest possible format: none; `dsmoe generate` and `dsmoe serve` run the artifact as it is."


def _find_top_k(ffn: MoeConfig, routing: RoutingConfig | None) -> int | None:
    rule = routing or ffn.router.inference
    return ffn.num_experts if rule.mode is RoutingMode.DENSE else rule.top_k


def _find_changes(config: ModelConfig, kind: Format, top_k: int) -> list[str]:
    parts: list[tuple[str, MoaConfig | MoeConfig]] = []
    for name, mixture in (("attention", config.attention), ("ffn", config.ffn)):
        if isinstance(mixture, MoaConfig | MoeConfig):
            parts.append((name, mixture))
    changes = []
    for name, mixture in parts:
        deployed = mixture.router.inference
        same = deployed.mode is RoutingMode.DENSE and top_k == mixture.num_experts
        if not same and deployed.top_k != top_k:
            changes.append(
                f"{name}: the artifact deploys {deployed.to_spec()}, the {kind} model runs top_k={top_k} of "
                f"{mixture.num_experts} experts"
            )
    return changes


def _to_fields(config: ModelConfig, kind: Format, top_k: int) -> dict[str, Any]:
    attention, ffn = config.attention, config.ffn
    assert isinstance(ffn, MoeConfig)
    fields: dict[str, Any] = {
        "architectures": [MODEL_CLASSES[kind]],
        "model_type": kind.value,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": attention.num_kv_heads,
        "intermediate_size": ffn.d_ff,
        "num_experts_per_tok": top_k,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        # Versions before 5 know only the first and would silently take their default for the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "output_router_logits": False,
        "use_cache": True,
    }
    if isinstance(attention, GqaConfig):
        fields["num_attention_heads"] = attention.num_heads
    return fields | _to_special_fields(config, ffn, kind)


def _to_special_fields(config: ModelConfig, ffn: MoeConfig, kind: Format) -> dict[str, Any]:
    head_dim = config.attention.head_dim
    if kind is Format.JETMOE:
        return {"kv_channels": head_dim, "num_local_experts": ffn.num_experts, "activation_function": "silu"}
    if kind is Format.MIXTRAL:
        return {
            "head_dim": head_dim,
            "num_local_experts": ffn.num_experts,
            "hidden_act": "silu",
            "sliding_window": None,
        }
    if kind is Format.GRANITEMOE:
        return {
            "num_local_experts": ffn.num_experts,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_multiplier": head_dim**-0.5,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }
    return {
        "num_experts": ffn.num_experts,
        "moe_intermediate_size": ffn.d_ff,
        "shared_expert_intermediate_size": 0,
        "norm_topk_prob": ffn.router.gates == "renormalized",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "use_sliding_window": False,
        "hidden_act": "silu",
    }
