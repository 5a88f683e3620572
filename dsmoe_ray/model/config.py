"""Sizes of the model and settings of its routers. Pure data: imports no torch."""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dsmoe_ray.config_io import Config, parse_config
from dsmoe_ray.errors import ConfigError

_StrictPositiveInt = Annotated[int, Field(gt=0, strict=True)]


class RoutingMode(StrEnum):
    """How the experts of a token are chosen from its router probabilities."""

    DENSE = "dense"
    TOP_K = "top_k"
    THRESHOLD = "threshold"
    THRESHOLD_TOP_K = "threshold_top_k"
    TOP_P = "top_p"
    PER_LAYER_TOP_K = "per_layer_top_k"


_PARAMETERS: dict[str, str | None] = {
    RoutingMode.DENSE: None,
    RoutingMode.TOP_K: "top_k",
    RoutingMode.THRESHOLD: "threshold",
    RoutingMode.THRESHOLD_TOP_K: "threshold",
    RoutingMode.TOP_P: "top_p",
    RoutingMode.PER_LAYER_TOP_K: "per_layer_top_k",
}
_SPECS = "dense, top_k=K, threshold=E, threshold_top_k=E, top_p=P, per_layer_top_k=K,K,..."


class RoutingConfig(Config):
    """Which experts of a mixture a token uses.

    A rule is for all layers until ``at_layer`` makes it that of one: a router never sees ``per_layer_top_k``.
    """

    mode: RoutingMode = RoutingMode.DENSE
    top_k: PositiveInt | None = None
    """For ``top_k``: experts kept per token."""
    threshold: NonNegativeFloat | None = None
    """For ``threshold`` and ``threshold_top_k``: keep experts with ``num_experts * probability > threshold``."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """For ``top_p``: keep the fewest experts whose probabilities reach this sum."""
    per_layer_top_k: Annotated[tuple[_StrictPositiveInt, ...], Field(min_length=1)] | None = None
    """For ``per_layer_top_k``: experts kept per token, layer by layer from the first."""

    @model_serializer(mode="wrap")
    def _leave_out_an_absent_table(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Digests in artifacts and checkpoints are of configurations written before there were tables.
        fields = write(self)
        return {name: value for name, value in fields.items() if name != "per_layer_top_k" or value is not None}

    @model_validator(mode="after")
    def _has_what_its_mode_needs(self) -> Self:
        needs = _PARAMETERS[self.mode]
        for name in ("top_k", "threshold", "top_p", "per_layer_top_k"):
            value = getattr(self, name)
            if name == needs and value is None:
                raise ValueError(f"routing mode {self.mode.value!r} needs {name}; add it")
            if name != needs and value is not None:
                raise ValueError(f"routing mode {self.mode.value!r} does not use {name}={value}; remove it")
        return self

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Read a rule as a person writes it: ``dense``, ``top_k=8``, ``threshold=0.48``, ``top_p=0.9``, ...

        Raises:
            ConfigError: it is no such rule.
        """
        mode, separator, value = (part.strip() for part in spec.partition("="))
        parameter = _PARAMETERS.get(mode)
        if mode not in _PARAMETERS or bool(separator) != (parameter is not None):
            raise ConfigError(f"routing {spec!r} is not one of {_SPECS}, for example top_k=8.")
        values: dict[str, Any] = {"mode": mode}
        if parameter is not None:
            values[parameter] = _read_table(value) if mode == RoutingMode.PER_LAYER_TOP_K else value
        return parse_config(values, cls, source=f"routing {spec!r}")

    def to_spec(self) -> str:
        """Return the text that ``parse`` reads back to this rule."""
        parameter = _PARAMETERS[self.mode]
        if parameter is None:
            return self.mode.value
        if self.per_layer_top_k is not None:
            return f"{self.mode.value}={','.join(map(str, self.per_layer_top_k))}"
        # Every digit counts, but a whole threshold is written without a fraction.
        return f"{self.mode.value}={getattr(self, parameter)}".removesuffix(".0")

    def at_layer(self, layer: int) -> Self:
        """Return the rule of one layer, 0 being the first; it is this rule itself unless it is a table."""
        if self.per_layer_top_k is None:
            return self
        return type(self)(mode=RoutingMode.TOP_K, top_k=self.per_layer_top_k[layer])

    def check_against(self, num_experts: int, *, num_layers: int | None = None) -> None:
        """Raise ``ValueError`` if this choice is impossible among ``num_experts`` or, where given, ``num_layers``."""
        table = self.per_layer_top_k
        if table is not None and max(table) > num_experts:
            raise ValueError(
                f"per_layer_top_k must be at most num_experts in every layer; got {max(table)} in layer "
                f"{table.index(max(table))}, num_experts={num_experts}"
            )
        if table is not None and num_layers is not None and len(table) != num_layers:
            raise ValueError(
                f"per_layer_top_k needs one number for each layer; got {len(table)}, num_layers={num_layers}"
            )
        if self.top_k is not None and self.top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts; got top_k={self.top_k}, num_experts={num_experts}")
        if self.threshold is not None and self.threshold >= num_experts:
            raise ValueError(
                f"threshold must be below num_experts, as no num_experts * probability exceeds that; "
                f"got threshold={self.threshold}, num_experts={num_experts}"
            )


class RouterConfig(Config):
    """How a mixture scores its experts and weighs those it keeps."""

    kind: Literal["linear", "mlp"] = "linear"
    d_hidden: PositiveInt | None = None
    """Width of the MLP router's hidden layer; the paper's parameter counts fit 512."""
    gates: Literal["raw", "renormalized"] = "raw"
    """``raw`` keeps the probabilities of the kept experts as they are; ``renormalized`` makes them sum to one."""
    gate_scale: PositiveFloat = 1.0
    """Constant factor on every gate; ``num_experts`` starts a mixture at a dense layer's output scale."""
    inference: RoutingConfig = RoutingConfig()
    """What the published model runs with unless told otherwise."""

    @model_validator(mode="after")
    def _hidden_width_fits_the_kind(self) -> Self:
        if (self.kind == "mlp") != (self.d_hidden is not None):
            raise ValueError(f"d_hidden goes with kind 'mlp' only; got kind={self.kind!r}, d_hidden={self.d_hidden}")
        return self


class GqaConfig(Config):
    """Plain grouped-query attention."""

    kind: Literal["gqa"]
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and {self.num_kv_heads}"
            )
        _check_head_dim(self.head_dim)
        return self


class MoaConfig(Config):
    """Mixture of attention heads: every expert owns ``num_kv_heads`` query heads and shares K and V."""

    kind: Literal["moa"]
    num_experts: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Self:
        self.router.inference.check_against(self.num_experts)
        _check_head_dim(self.head_dim)
        return self

    @property
    def num_heads(self) -> int:
        """Query heads of all experts together."""
        return self.num_experts * self.num_kv_heads


class DenseFfnConfig(Config):
    """One ordinary feed-forward network."""

    kind: Literal["dense"]
    d_ff: PositiveInt
    activation: Literal["gelu", "swiglu"] = "gelu"


class MoeConfig(Config):
    """Mixture of feed-forward experts."""

    kind: Literal["moe"]
    num_experts: PositiveInt
    d_ff: PositiveInt
    """Hidden width of one expert."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    router: RouterConfig = RouterConfig()

    @model_validator(mode="after")
    def _routing_is_possible(self) -> Self:
        self.router.inference.check_against(self.num_experts)
        return self


AttentionConfig = Annotated[GqaConfig | MoaConfig, Field(discriminator="kind")]
FfnConfig = Annotated[DenseFfnConfig | MoeConfig, Field(discriminator="kind")]


class ModelConfig(Config):
    """A decoder-only transformer whose layers are all alike."""

    vocab_size: PositiveInt
    d_model: PositiveInt
    num_layers: PositiveInt
    max_seq_len: PositiveInt
    """Longest sequence, prompt and output together, in tokens."""
    attention: AttentionConfig
    ffn: FfnConfig
    tie_embeddings: bool = False
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-6
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights; output projections get it divided by sqrt(2 num_layers)."""

    @model_validator(mode="after")
    def _routing_is_possible_in_every_layer(self) -> Self:
        for mixture in (self.attention, self.ffn):
            if isinstance(mixture, MoaConfig | MoeConfig):
                mixture.router.inference.check_against(mixture.num_experts, num_layers=self.num_layers)
        return self

    def with_ffn_routing(self, rule: RoutingConfig) -> Self:
        """Return the same model with another deployed routing of its FFN mixture.

        Raises:
            ValueError: there is no such mixture, or the rule is impossible in it.
        """
        if not isinstance(self.ffn, MoeConfig):
            raise ValueError("this model has one dense FFN, no experts to choose from")
        router = self.ffn.router.model_copy(update={"inference": rule})
        derived = self.model_copy(update={"ffn": self.ffn.model_copy(update={"router": router})})
        # A copy is not validated.
        return type(self).model_validate(derived.model_dump())

    def dense_twin(self) -> "ModelConfig":
        """Return the dense transformer of equal shape: one FFN of the experts' total width, plain attention."""
        attention: GqaConfig | MoaConfig = self.attention
        if isinstance(attention, MoaConfig):
            attention = GqaConfig(
                kind="gqa",
                num_heads=attention.num_heads,
                num_kv_heads=attention.num_kv_heads,
                head_dim=attention.head_dim,
            )
        ffn: DenseFfnConfig | MoeConfig = self.ffn
        if isinstance(ffn, MoeConfig):
            ffn = DenseFfnConfig(kind="dense", d_ff=ffn.num_experts * ffn.d_ff, activation=ffn.activation)
        return self.model_copy(update={"attention": attention, "ffn": ffn})


def _read_table(text: str) -> list[int | str]:
    """Return the numbers of a comma-separated list; what is no number stays as it is, for the error message."""
    parts = [part.strip() for part in text.split(",")]
    return [int(part) if part.isdecimal() and len(part) < 10 else part for part in parts]


def _check_head_dim(head_dim: int) -> None:
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions; got {head_dim}")
