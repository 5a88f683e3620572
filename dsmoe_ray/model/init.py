"""Every initial value, in one table.

A parameter's values depend on the seed and its name only, so any rank can draw any one of them, in any order, and gets
the same numbers as a single process would.
"""

import hashlib
import math

import torch
from torch import nn

from dsmoe_ray.model.config import ModelConfig

_OUTPUT_PROJECTIONS = ("wo", "w2")


def draw_initial(name: str, shape: torch.Size, config: ModelConfig, *, seed: int) -> torch.Tensor:
    """Return the whole initial value of a parameter, float32 on CPU.

    | parameter | value |
    | --- | --- |
    | norms | 1 |
    | output projections ``wo``, ``w2`` | normal, ``init_std / sqrt(2 num_layers)``: keeps the residual stream's scale |
    | all others | normal, ``init_std`` |
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    std = config.init_std
    if name.rsplit(".", 1)[-1] in _OUTPUT_PROJECTIONS:
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator) * std


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, *, seed: int) -> None:
    """Fill every parameter of an unsharded model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(draw_initial(name, parameter.shape, config, seed=seed))
