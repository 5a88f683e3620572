"""What the engine asks of whatever computes a step: a compiled CPU kernel, a GPU, plain PyTorch."""

from typing import Protocol

import torch

from dsmoe_ray.inference.batch import ForwardBatch
from dsmoe_ray.model.config import ModelConfig


class ModelRunner(Protocol):
    """A model with its weights and the memory for keys and values; it knows no request and makes no choice."""

    config: ModelConfig
    block_size: int
    """Positions in one block of the KV cache."""
    num_blocks: int

    @property
    def kv_cache_bytes(self) -> int:
        """Return the memory of all blocks, filled or not."""

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute one step and return its logits ``(R, V)``, float32 on the CPU.

        Afterwards the keys and values of all the batch's tokens are in the cache, in the blocks of its tables. If it
        raises, what it has written so far counts for nothing.
        """
        ...
