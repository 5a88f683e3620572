"""What an artifact tells about how its deployed routing was chosen: pure data, written into the manifest."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from dsmoe_ray.config_io import Config

CalibrationMethod = Literal["auto", "per_layer_top_k", "threshold"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class FrontierPoint(Config):
    """One routing of the FFN experts: what it costs and what it loses, on both halves of the calibration text.

    A share is that of the FFN experts, and so of their parameters and FLOPs, that a token uses, averaged over tokens
    and layers.
    """

    routing: str
    """As ``RoutingConfig.parse`` reads it."""
    active_ffn_ratio: Share
    """On the half that chose nothing."""
    loss: float
    """In nats per token, on the half that chose nothing."""
    selection_active_ffn_ratio: Share
    """On the half that the choice was made on."""
    selection_loss: float


class LayerProfile(Config):
    """How much the loss rises when one layer keeps ``k`` experts and every other layer keeps all."""

    top_k: list[PositiveInt]
    loss_increase: list[list[float]]
    """A row for each layer, one number for each ``top_k``."""


class CalibrationRecord(Config):
    """One calibration: what was asked, on which text, what was measured and chosen."""

    budget: Annotated[float, Field(gt=0.0, le=1.0)]
    """The largest share of the FFN experts that a token may use, averaged over tokens and layers."""
    method: CalibrationMethod
    routing: str
    """The choice: the deployed routing of the FFN from then on."""
    deployed_before: str
    data: str
    """As it was named; ``data_sha256`` tells whether it is the same text."""
    data_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the token ids that were read, as little-endian 32-bit numbers."""
    seq_len: PositiveInt
    num_selection_tokens: PositiveInt
    num_held_out_tokens: PositiveInt
    created_unix_s: NonNegativeFloat
    duration_s: PositiveFloat
    frontier: list[FrontierPoint]
    """By the share on the half that chose nothing, the largest first."""
    profile: LayerProfile | None
    """None if no table of layers was asked for."""
