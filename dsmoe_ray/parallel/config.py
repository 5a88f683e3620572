"""Degrees of each mesh axis and how ranks exchange. Pure data: imports no torch."""

from typing import Literal, Self

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from dsmoe_ray.config_io import Config


class ParallelConfig(Config):
    """How a run is spread over ranks; the world is ``dp_replicate * dp_shard * ep``."""

    ep: PositiveInt = 1
    """Ranks that share out the experts of each layer; keep it inside a node."""
    dp_shard: PositiveInt = 1
    """Ranks over which the parameters held by one ``ep`` rank are sharded again (FSDP2)."""
    dp_replicate: PositiveInt = 1
    """Copies of the whole model; the axis that goes across nodes."""
    trunk: Literal["replicate", "shard"] = "replicate"
    """``replicate``: every rank holds the trunk, one flat gradient all-reduce. ``shard``: FSDP2 over dp_shard x ep.
    Experts are sharded by FSDP2 over dp_shard either way."""
    exchange: Literal["tokens"] = "tokens"
    """What travels between the ranks of an ``ep`` group: tokens to the experts, by dense all-to-all."""
    exchange_chunks: PositiveInt = 1
    """Token chunks per layer, so that the exchange of one chunk runs under the GEMMs of another."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA with NCCL where a GPU is visible, otherwise CPU with gloo."""
    gpus_per_shard: NonNegativeInt | None = None
    """GPUs Ray reserves for one shard; by default 1 on CUDA clusters and 0 otherwise."""
    cpus_per_shard: PositiveInt = 1
    """CPUs Ray reserves for one shard, and its number of compute threads."""
    timeout_s: PositiveFloat = 120.0
    """A collective or a call that takes longer counts as a lost rank."""

    @model_validator(mode="after")
    def _gpus_fit_the_device(self) -> Self:
        gpus = self.gpus_per_shard
        if (self.device == "cuda" and gpus == 0) or (self.device == "cpu" and gpus):
            raise ValueError(f"gpus_per_shard={gpus} contradicts device={self.device!r}; leave one out")
        return self

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.dp_replicate * self.dp_shard * self.ep

    def check_against(self, num_experts: int | None) -> None:
        """Raise ``ValueError`` if the experts of a layer cannot be shared out evenly."""
        if num_experts is None and self.ep > 1:
            raise ValueError(f"parallel.ep={self.ep} needs a mixture of FFN experts, but model.ffn is dense; set ep=1")
        if num_experts is not None and num_experts % (self.ep * self.dp_shard):
            raise ValueError(
                f"model.ffn.num_experts={num_experts} is not divisible by ep * dp_shard = {self.ep} * {self.dp_shard}; "
                f"choose degrees whose product divides {num_experts}"
            )
