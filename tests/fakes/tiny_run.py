"""One rank that trains alone in the test's own process, on text made of numbers."""

import numpy as np
import torch

from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.mesh import World
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.train_step import Trainer

ALONE = World(rank=0, config=ParallelConfig(), device=torch.device("cpu"), mesh=None, backend="gloo")


def make_shards(*, num_documents: int = 20, length: int = 100, vocab_size: int = 300, digest: str = "") -> TokenShards:
    """Return documents with structure: a token mostly follows from the one before it. Id 0 ends each."""
    generator = np.random.default_rng(0)
    successor = generator.permutation(vocab_size - 1) + 1
    documents = []
    for _ in range(num_documents):
        tokens = [1]
        for surprise in generator.random(length - 2) < 0.1:
            tokens.append(int(generator.integers(1, 9)) if surprise else int(successor[tokens[-1] - 1]))
        documents.append(np.array([*tokens, 0]))
    shards = TokenShards.from_documents(documents, vocab_size=vocab_size)
    shards.stream_digest = digest
    return shards


def make_trainer(
    config: TrainingRunConfig, *, world: World = ALONE, data: TokenShards | None = None, **rest: TokenShards | None
) -> Trainer:
    return Trainer(config, world=world, data=data or make_shards(), **rest)
