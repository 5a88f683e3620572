"""How much the engine takes on at once, and how it computes. Pure data: imports no torch."""

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from dsmoe_ray.config_io import Config
from dsmoe_ray.errors import ConfigError

DEFAULT_KV_CACHE_BYTES = 1 << 30


class EngineConfig(Config):
    """Limits of the inference engine: memory, queue and the work of one step."""

    max_num_seqs: PositiveInt = 32
    """Sequences that run at once."""
    max_batched_tokens: PositiveInt = 512
    """Tokens computed in one step: one for every decoding sequence, prompts in chunks for the rest. More reads
    prompts faster, fewer makes the pauses between two tokens of a running sequence shorter."""
    max_waiting: PositiveInt = 1024
    """Sequences that may wait for their turn; more are refused. A request for n samples counts as n."""
    block_size: PositiveInt = 16
    """Positions in one block of the KV cache, the unit in which memory is given and prompts are shared."""
    kv_cache_bytes: PositiveInt | None = None
    """Memory for keys and values; by default 1 GiB. At most what ``max_num_seqs`` longest sequences fill is taken."""
    num_blocks: PositiveInt | None = None
    """The size of the KV cache in blocks, instead of in bytes."""
    prefix_cache: bool = True
    """Find the keys and values of a prompt's beginning if an earlier sequence began the same way."""
    numerics: Literal["auto", "exact", "fast"] = "auto"
    """``exact``: a sequence's results do not depend on its neighbours, on chunks or on where it runs. ``fast``: they
    agree to rounding, except under ``threshold_top_k``, whose mean is over all tokens computed together. ``auto`` is
    exact on a CPU and fast on a GPU."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """What weights, keys and values are held in; ``auto`` takes the artifact's. ``int8``, on a CPU only, rounds
    matrices when they are loaded, into memory of their own, half of what bfloat16 takes; keys and values are then
    bfloat16."""

    @model_validator(mode="after")
    def _a_full_house_leaves_room_for_prompts(self) -> Self:
        least = self.max_num_seqs + self.block_size
        if self.max_batched_tokens < least:
            raise ValueError(
                f"max_batched_tokens must be at least max_num_seqs + block_size = {least}, so that prompts move on "
                f"while every other sequence decodes; got {self.max_batched_tokens}"
            )
        return self

    @model_validator(mode="after")
    def _memory_is_given_once(self) -> Self:
        if self.kv_cache_bytes is not None and self.num_blocks is not None:
            raise ValueError(
                f"kv_cache_bytes={self.kv_cache_bytes} and num_blocks={self.num_blocks} both give the size of the KV "
                "cache; leave one out"
            )
        return self

    def compute_num_blocks(self, *, bytes_per_block: int, max_seq_len: int) -> int:
        """Return how many blocks the KV cache has.

        Args:
            bytes_per_block: Keys and values of all layers for ``block_size`` positions.
            max_seq_len: The model's longest sequence.

        Raises:
            ConfigError: there is memory for none.
        """
        if self.num_blocks is not None:
            return self.num_blocks
        kv_cache_bytes = self.kv_cache_bytes or DEFAULT_KV_CACHE_BYTES
        if kv_cache_bytes < bytes_per_block:
            raise ConfigError(
                f"kv_cache_bytes={kv_cache_bytes} holds no block: one of {self.block_size} positions takes "
                f"{bytes_per_block} bytes of this model. Raise kv_cache_bytes or lower block_size."
            )
        most_useful = self.max_num_seqs * -(-max_seq_len // self.block_size)
        return min(kv_cache_bytes // bytes_per_block, most_useful)
