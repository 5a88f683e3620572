"""The machines that a simulation assumes, and the made-up traffic it can run on. Pure data."""

from typing import Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dsmoe_ray.config_io import Config
from dsmoe_ray.serving.config import ExpertScalingConfig


class SimulatedScalingConfig(ExpertScalingConfig):
    """The serving application's own settings, with room for the hot experts of large clusters."""

    max_replicas: PositiveInt = 256


class SimulationConfig(Config):
    """A cluster of equal hosts."""

    hosts: PositiveInt = 1000
    """Most hosts there are; the fixed baseline always uses them all."""
    min_hosts: PositiveInt = 1
    hosts_per_node: PositiveInt = 8
    experts_per_host: PositiveInt = 64
    """Experts that fit a host's memory."""
    expert_bytes: PositiveInt = 8 << 20
    tokens_per_host_s: PositiveFloat = 1000.0
    """Tokens of one expert that a busy host computes in a second."""
    tokens_per_call: PositiveInt = 16
    """Tokens that one call brings to a host; longer calls wait longer for each other."""
    network_s: NonNegativeFloat = 0.0005
    """Added to every call."""
    host_start_s: NonNegativeFloat = 15.0
    """From the decision for one more host until it can load experts."""
    load_start_s: NonNegativeFloat = 0.05
    """Of loading one expert, beside its bytes."""
    disk_bytes_per_s: PositiveFloat = 1e9
    warm_up_s: NonNegativeFloat = 20.0
    """At the start of a trace: counts are settling and nothing is reported."""
    experts: SimulatedScalingConfig = SimulatedScalingConfig()
    """Decides about replicas; hosts follow their utilization with the same target and delays."""

    @property
    def memory_bytes(self) -> int:
        """Return the memory of a host."""
        return self.experts_per_host * self.expert_bytes

    @property
    def load_s(self) -> float:
        """Return how long it takes to load one expert."""
        return self.load_start_s + self.expert_bytes / self.disk_bytes_per_s

    @model_validator(mode="after")
    def _hosts_are_possible(self) -> Self:
        if self.min_hosts > self.hosts:
            raise ValueError(f"min_hosts must be at most hosts; got {self.min_hosts} and {self.hosts}")
        return self


class SyntheticConfig(Config):
    """Made-up traffic: tokens arrive at random (Poisson) at rates that differ by expert and change with time."""

    layers: PositiveInt = 40
    experts: PositiveInt = 250
    """Of each layer. All layers have the same load in total."""
    tokens_per_s: PositiveFloat = 400_000.0
    """Mean over time and sum over all experts, a token counted once for each expert that it visits."""
    duration_s: PositiveFloat = 300.0
    seed: NonNegativeInt = 0
    swing: float = Field(default=0.3, ge=0, lt=1)
    """Share by which traffic rises above and falls below its mean, as a sine."""
    period_s: PositiveFloat = 300.0
    """Of the swing."""
    alpha: NonNegativeFloat = 1.0
    """zipf: the r-th busiest expert of a layer has a load of r ** -alpha."""
    hot_ratio: float = Field(default=1 / 32, gt=0, le=1)
    """shifting: share of a layer's experts that are hot at a time."""
    hot_factor: PositiveFloat = 20.0
    """shifting: how many times the load of an expert grows while it is hot."""
    shift_every_s: PositiveFloat = 20.0
    """shifting: after so long others are hot."""
