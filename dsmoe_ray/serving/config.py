"""One serving application, as a YAML file or a command line describes it. Pure data: imports no torch, Ray or grpc."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dsmoe_ray.config_io import Config
from dsmoe_ray.inference.config import EngineConfig


class HttpConfig(Config):
    """Where clients connect, and what they may send."""

    host: str = "127.0.0.1"
    """Loopback unless told otherwise."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes a free one."""
    max_body_bytes: PositiveInt = 8 << 20
    max_prompts: PositiveInt = 128
    """Prompts in one request."""
    max_queued_tokens: PositiveInt = 1 << 18
    """Prompt and wanted tokens of all requests that are taken on and not finished; more are answered with 429."""
    max_sequences: PositiveInt | None = None
    """Texts under way at once; more are answered with 429 too. By default what the routers run at once, so that no
    text waits for another one's end."""
    max_request_s: PositiveFloat = 600.0
    """Longest life of a request; a client may ask for less."""
    max_header_bytes: PositiveInt = 64 << 10
    body_timeout_s: PositiveFloat = 30.0
    """Longest time that a request may take to arrive."""
    drain_s: PositiveFloat = 30.0
    """How long requests may go on after the order to stop."""


class GrpcConfig(Config):
    """Where callers connect who use gRPC instead of HTTP; limits are those of ``http``."""

    host: str = "127.0.0.1"
    """Loopback unless told otherwise."""
    port: int | None = Field(default=None, ge=0, le=65535)
    """None serves no gRPC, 0 takes a free port."""


class WireConfig(Config):
    """The calls between routers and expert hosts."""

    expert_deadline_s: PositiveFloat = 0.5
    """A host that has not answered by then is taken for hung, and its call goes to another replica."""
    request_deadline_s: PositiveFloat = 30.0
    """How long a step may wait for an expert that nobody holds."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of hidden states on the wire; ``auto`` takes the model's own, which loses nothing."""
    same_node: Literal["auto", "off"] = "auto"
    """Whether ends that share a machine use a Unix socket instead of gRPC."""
    max_frame_bytes: PositiveInt = 64 << 20
    host: str = "127.0.0.1"
    """Where routers and hosts can be reached from other machines; ``node`` is the address that the machine has in the
    cluster. Loopback, the default, keeps an application on one machine."""


class ExpertScalingConfig(Config):
    """How many replicas each expert gets, in the words of Ray Serve's autoscaling."""

    min_replicas: NonNegativeInt = 1
    """0 lets an expert that nobody wants leave memory; its next token waits until it is read from disk."""
    max_replicas: PositiveInt = 8
    target_utilization: float = Field(default=0.7, gt=0, le=1)
    """Share of a host's capacity that its experts' load should take."""
    upscale_delay_s: float = Field(default=1.0, ge=0)
    downscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_margin_ratio: float = Field(default=0.1, ge=0, lt=1)
    """A replica goes only if the others stay below the target by this share of it, so that none comes and goes."""
    look_back_s: PositiveFloat = 1.0
    """Half-life of the moving average of an expert's load."""
    tokens_per_replica_s: PositiveFloat | None = None
    """Load that one replica takes; by default measured from the hosts' compute time."""
    interval_s: PositiveFloat = 0.25
    """How often loads are read and decisions made."""
    pinned: dict[str, NonNegativeInt] = Field(default_factory=dict)
    """Replicas of single experts whatever their load, by ``layer/expert``, such as ``3/17: 2``."""

    @model_validator(mode="after")
    def _minimum_is_possible(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas must be at most max_replicas; got {self.min_replicas} and {self.max_replicas}"
            )
        return self


class ExpertHostsConfig(Config):
    """The processes that hold experts."""

    count: NonNegativeInt = 0
    """0 computes experts where the rest of the model is, in one process and without Ray."""
    max_count: PositiveInt | None = None
    """Lets the pool grow with its load; by default it stays at ``count``."""
    memory_bytes: PositiveInt | None = None
    """Most that the experts of one host may take; by default what all experts take."""
    num_threads: PositiveInt = 1
    num_cpus: PositiveFloat = 0.5
    """Asked of Ray for one host."""
    num_gpus: float = Field(default=0.0, ge=0)
    heartbeat_timeout_s: PositiveFloat = 3.0
    """A host that says nothing for so long is taken for dead, and its experts are given to others; one that a router
    cannot reach either, much sooner."""


class RoutersConfig(Config):
    """The processes that run everything but the experts."""

    count: PositiveInt = 1
    max_count: PositiveInt | None = None
    num_threads: PositiveInt | None = None
    """By default as many as the machine has cores."""
    num_cpus: PositiveFloat = 0.5
    num_gpus: float = Field(default=0.0, ge=0)


class ServingConfig(Config):
    """One model behind one endpoint."""

    artifact: Path
    model_name: str | None = None
    """What clients call it; by default the name of the artifact's directory."""
    http: HttpConfig = HttpConfig()
    grpc: GrpcConfig = GrpcConfig()
    gateways: PositiveInt = 1
    routers: RoutersConfig = RoutersConfig()
    hosts: ExpertHostsConfig = ExpertHostsConfig()
    experts: ExpertScalingConfig = ExpertScalingConfig()
    wire: WireConfig = WireConfig()
    engine: EngineConfig = EngineConfig()
