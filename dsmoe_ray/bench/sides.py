"""Trainers as sides of a comparison: the very step that a shard of a run makes, on random tokens."""

import numpy as np
import torch

from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.parallel.collectives import join_world
from dsmoe_ray.parallel.mesh import World
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.train_step import Trainer

_NUM_TOKENS = 1 << 20


class TrainerSide:
    """One rank's trainer in this process."""

    def __init__(self, config: TrainingRunConfig, *, world: World) -> None:
        self.tokens_per_step = config.train.num_tokens_per_step
        self._device = world.device
        self._trainer = Trainer(config, world=world, data=make_tokens(config.model.vocab_size))

    def run(self, num_steps: int) -> float:
        """Do this many steps and return the seconds they took, all work on a GPU included."""
        synchronize(self._device)
        start_s = monotonic_s()
        for _ in range(num_steps):
            self._trainer.run_step()
        synchronize(self._device)
        return monotonic_s() - start_s


def build_alone(config: TrainingRunConfig, *, device: str) -> TrainerSide:
    """Return a trainer that holds the whole model."""
    world = join_world(config.parallel, rank=0, address="127.0.0.1", port=0, device=torch.device(device))
    return TrainerSide(config, world=world)


def make_tokens(vocab_size: int) -> TokenShards:
    """Return a stream of random tokens in memory, always the same. A step's time does not depend on what they say."""
    tokens = np.random.default_rng(0).integers(1, vocab_size, size=_NUM_TOKENS, dtype=np.int64)
    return TokenShards.from_packed(tokens, np.array([_NUM_TOKENS]), vocab_size=vocab_size)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
