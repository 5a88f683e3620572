"""What ``config.json`` of each stock format says, in our terms: settings, multipliers, and what we cannot hold.

A missing key means what ``transformers`` takes it for.
"""

import math
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from dsmoe_ray.artifact.hugging_face.formats import Format

_JETMOE_NORM_EPS = 1e-6
_SILU = ("silu", "swish")

# Far beyond any model, and small enough for arithmetic.
Size = Annotated[int, Field(gt=0, le=1 << 31)]
Multiplier = Annotated[float, Field(ge=1e-6, le=1e6)]


class StockFields(BaseModel):
    """Keys that all four formats share."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)
    default_rope_theta: ClassVar[float] = 10000.0

    architectures: list[str] | None = None
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_experts_per_tok: Size
    max_position_embeddings: Size
    rms_norm_eps: PositiveFloat = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: PositiveFloat = 0.02
    rope_theta: PositiveFloat | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    auto_map: dict[str, Any] | None = None
    hidden_act: str = "silu"

    def find_obstacles(self) -> list[str]:
        """Return every reason why the model cannot be held."""
        obstacles = []
        if self.hidden_act not in _SILU:
            obstacles.append(f"its experts use {self.hidden_act!r}, ours silu (swiglu)")
        if self.quantization_config is not None:
            obstacles.append("its weights are quantized (quantization_config)")
        if self.auto_map is not None:
            obstacles.append("it names code of its own (auto_map), which is never run, so what it computes is unknown")
        return obstacles + self._find_rope_obstacles()

    def to_rope_theta(self) -> float:
        """Return the base of the rotary frequencies."""
        theta = (self.rope_parameters or {}).get("rope_theta", self.rope_theta)
        return self.default_rope_theta if theta is None else theta

    def to_values(self) -> dict[str, Any]:
        """Return fields of ``ModelConfig``, all but the mixtures."""
        return {
            "vocab_size": self.vocab_size,
            "d_model": self.hidden_size,
            "num_layers": self.num_hidden_layers,
            "max_seq_len": self.max_position_embeddings,
            "tie_embeddings": self.tie_word_embeddings,
            "rope_theta": self.to_rope_theta(),
            "norm_eps": self.rms_norm_eps,
            "init_std": self.initializer_range,
        }

    def _find_rope_obstacles(self) -> list[str]:
        obstacles = []
        for name, settings in (("rope_parameters", self.rope_parameters), ("rope_scaling", self.rope_scaling)):
            kind = (settings or {}).get("rope_type", (settings or {}).get("type", "default"))
            # Either form may give a share of the head to rotate.
            share = (settings or {}).get("partial_rotary_factor", 1.0)
            # One setting for each kind of layer would be a dictionary of dictionaries.
            if kind != "default" or share != 1.0 or any(isinstance(value, dict) for value in (settings or {}).values()):
                obstacles.append(f"its rotary positions are of a type that ours are not ({name}={settings})")
        theta = (self.rope_parameters or {}).get("rope_theta", self.rope_theta)
        if theta is not None and not (_is_number(theta) and theta > 0):
            obstacles.append(f"rope_theta={theta!r} is not a positive number")
        if self.rope_theta is not None and theta != self.rope_theta:
            obstacles.append(f"rope_theta={self.rope_theta} and rope_parameters disagree; keep the one that is meant")
        return obstacles


class GqaFields(StockFields):
    """Keys of the formats with plain attention."""

    num_attention_heads: Size
    num_key_value_heads: Size | None
    head_dim: Size | None = None
    sliding_window: int | None = None

    def find_obstacles(self) -> list[str]:
        """Return every reason why the model cannot be held."""
        obstacles = super().find_obstacles()
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            obstacles.append(f"{self.num_attention_heads} heads do not divide hidden_size={self.hidden_size}")
        # A window as long as the longest sequence hides nothing.
        if self.is_windowed() and (self.sliding_window or 0) < self.max_position_embeddings:
            obstacles.append(
                f"its attention sees the last {self.sliding_window} positions only (sliding_window), ours all of "
                f"max_position_embeddings={self.max_position_embeddings}"
            )
        return obstacles

    def is_windowed(self) -> bool:
        """Return whether a layer's attention has a sliding window."""
        return self.sliding_window is not None

    def to_values(self) -> dict[str, Any]:
        """Return fields of ``ModelConfig``."""
        attention = {
            "kind": "gqa",
            "num_heads": self.num_attention_heads,
            "num_kv_heads": self.num_key_value_heads or self.num_attention_heads,
            "head_dim": self.to_head_dim(),
        }
        return super().to_values() | {"attention": attention}

    def to_head_dim(self) -> int:
        """Return the width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def to_ffn(self, *, num_experts: int, d_ff: int, gates: str = "renormalized", gate_scale: float = 1.0) -> Any:
        """Return the field ``ffn`` of ``ModelConfig``."""
        router = _to_router(self.num_experts_per_tok, gates=gates, gate_scale=gate_scale)
        return {"kind": "moe", "num_experts": num_experts, "d_ff": d_ff, "activation": "swiglu", "router": router}


class MixtralFields(GqaFields):
    """Keys of Mixtral."""

    default_rope_theta: ClassVar[float] = 1e6
    rms_norm_eps: PositiveFloat = 1e-5
    num_local_experts: Size

    def to_values(self) -> dict[str, Any]:
        """Return fields of ``ModelConfig``."""
        ffn = self.to_ffn(num_experts=self.num_local_experts, d_ff=self.intermediate_size)
        return super().to_values() | {"ffn": ffn}


class GraniteMoeFields(GqaFields):
    """Keys of GraniteMoe; its multipliers ``m`` (embedding), ``r`` (residual), ``l`` (logits) are folded.

    The residual stream is ``m E + r f_1 + r f_2 + ...`` and everything that reads it norms it first. So it may be
    carried divided by ``m``: then embeddings stay as they are, also where the head shares them, every output is scaled
    by ``r / m``, and the norms' epsilon, which is added to a square, by ``1 / m^2``. Logits over ``l`` are the last
    norm's weight over ``l``.
    """

    num_local_experts: Size
    attention_multiplier: Multiplier = 1.0
    embedding_multiplier: Multiplier = 1.0
    residual_multiplier: Multiplier = 1.0
    logits_scaling: Multiplier = 1.0

    def is_windowed(self) -> bool:
        """Return whether a layer's attention has a sliding window."""
        return False

    def to_values(self) -> dict[str, Any]:
        """Return fields of ``ModelConfig``."""
        ffn = self.to_ffn(
            num_experts=self.num_local_experts, d_ff=self.intermediate_size, gate_scale=self._output_factor
        )
        return super().to_values() | {"ffn": ffn, "norm_eps": self.rms_norm_eps / self.embedding_multiplier**2}

    def to_scales(self) -> dict[str, float]:
        """Return the factors of parameters of ours."""
        scales = {
            "attention.wq": _without_rounding(self.attention_multiplier * self.to_head_dim() ** 0.5),
            "attention.wo": self._output_factor,
            "norm.weight": 1.0 / self.logits_scaling,
        }
        return {name: factor for name, factor in scales.items() if factor != 1.0}

    def to_folded(self) -> list[str]:
        """Return which multipliers went where, one sentence each."""
        told = []
        if "attention.wq" in self.to_scales():
            told.append(f"attention_multiplier={self.attention_multiplier} into wq")
        if self._output_factor != 1.0:
            told.append(
                f"embedding_multiplier={self.embedding_multiplier} and residual_multiplier={self.residual_multiplier} "
                "into wo, gate_scale and norm_eps"
            )
        if self.logits_scaling != 1.0:
            told.append(f"logits_scaling={self.logits_scaling} into the last norm")
        return told

    @property
    def _output_factor(self) -> float:
        return self.residual_multiplier / self.embedding_multiplier


class Qwen2MoeFields(GqaFields):
    """Keys of Qwen2-MoE."""

    num_experts: Size
    moe_intermediate_size: Size
    shared_expert_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    use_sliding_window: bool = False
    layer_types: list[str] | None = None

    def find_obstacles(self) -> list[str]:
        """Return every reason why the model cannot be held."""
        obstacles = super().find_obstacles()
        if self.shared_expert_intermediate_size:
            obstacles.append(
                f"it has a shared expert of width {self.shared_expert_intermediate_size} beside those it selects; ours "
                "have none"
            )
        if self.decoder_sparse_step != 1 or self.mlp_only_layers:
            obstacles.append(
                f"not all of its layers are mixtures (decoder_sparse_step={self.decoder_sparse_step}, "
                f"mlp_only_layers={self.mlp_only_layers}); ours are all alike"
            )
        return obstacles

    def is_windowed(self) -> bool:
        """Return whether a layer's attention has a sliding window."""
        return self.use_sliding_window or any(kind != "full_attention" for kind in self.layer_types or [])

    def to_values(self) -> dict[str, Any]:
        """Return fields of ``ModelConfig``."""
        gates = "renormalized" if self.norm_topk_prob else "raw"
        return super().to_values() | {
            "ffn": self.to_ffn(num_experts=self.num_experts, d_ff=self.moe_intermediate_size, gates=gates)
        }


class JetMoeFields(StockFields):
    """Keys of JetMoE."""

    tie_word_embeddings: bool = True
    initializer_range: PositiveFloat = 0.01
    num_key_value_heads: Size
    kv_channels: Size
    num_local_experts: Size
    hidden_act: str = Field("silu", alias="activation_function")

    def find_obstacles(self) -> list[str]:
        """Return every reason why the model cannot be held."""
        obstacles = super().find_obstacles()
        if self.rms_norm_eps != _JETMOE_NORM_EPS:
            obstacles.append(
                f"its last norm has rms_norm_eps={self.rms_norm_eps} while the format's layers have "
                f"{_JETMOE_NORM_EPS}; ours have one for all"
            )
        return obstacles

    def to_values(self) -> dict[str, Any]:
        """Return fields of ``ModelConfig``."""
        mixture = {"num_experts": self.num_local_experts, "router": _to_router(self.num_experts_per_tok)}
        return super().to_values() | {
            "attention": {
                "kind": "moa",
                "num_kv_heads": self.num_key_value_heads,
                "head_dim": self.kv_channels,
                **mixture,
            },
            "ffn": {"kind": "moe", "d_ff": self.intermediate_size, "activation": "swiglu", **mixture},
        }


SCHEMAS: dict[Format, type[StockFields]] = {
    Format.JETMOE: JetMoeFields,
    Format.GRANITEMOE: GraniteMoeFields,
    Format.MIXTRAL: MixtralFields,
    Format.QWEN2_MOE: Qwen2MoeFields,
}


def _to_router(top_k: int, *, gates: str = "renormalized", gate_scale: float = 1.0) -> dict[str, Any]:
    inference = {"mode": "top_k", "top_k": top_k}
    return {"kind": "linear", "gates": gates, "gate_scale": gate_scale, "inference": inference}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without_rounding(factor: float) -> float:
    """Return the power of two that a factor misses by its last digit only, else the factor: roots are rarely exact."""
    power = 2.0 ** round(math.log2(factor))
    return power if math.isclose(factor, power, rel_tol=1e-15) else factor
