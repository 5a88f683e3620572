"""Which samples a rank reads in a step, as model inputs.

The samples of a step depend on the seed and the step only: rank r of w reads the r-th of w equal, consecutive parts of
the step's global batch, so that any number of ranks trains on the same tokens.

Shape suffixes: B sequences, S positions.
"""

from typing import NamedTuple

import torch

from dsmoe_ray.data.token_shards import SampleOrder, TokenShards
from dsmoe_ray.errors import DataError
from dsmoe_ray.model.losses import IGNORED_TARGET
from dsmoe_ray.training.config import TrainingRunConfig


class Batch(NamedTuple):
    """What one micro-step runs on."""

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    document_ids_BS: torch.Tensor | None


class BatchReader:
    """Reads one rank's part of every step."""

    def __init__(self, config: TrainingRunConfig, data: TokenShards, *, rank: int, device: torch.device) -> None:
        self._config, self._data, self._rank, self._device = config, data, rank, device
        num_samples = data.num_samples(config.train.seq_len)
        if num_samples < 1:
            raise DataError(
                f"the training text has {data.num_tokens} tokens, fewer than seq_len + 1 = {config.train.seq_len + 1}; "
                "add text or lower train.seq_len"
            )
        self._order = SampleOrder(num_samples=num_samples, seed=config.run.seed)

    def read_step(self, step: int) -> list[Batch]:
        """Return this rank's micro-steps of the step with this index."""
        per_rank, size = self._config.sequences_per_rank, self._config.sequences_per_micro_step
        first = (step * self._config.parallel.world_size + self._rank) * per_rank
        indices = [self._order.sample_index(first + offset) for offset in range(per_rank)]
        return [self._read(self._data, indices[start : start + size]) for start in range(0, per_rank, size)]

    def read_held_out(self, held_out: TokenShards) -> list[Batch]:
        """Return this rank's part of the first ``eval_tokens`` of the held-out text, the same for every evaluation.

        Raises:
            DataError: the held-out text is shorter than one sample.
        """
        world_size, seq_len = self._config.parallel.world_size, self._config.train.seq_len
        available = held_out.num_samples(seq_len)
        if available < 1:
            raise DataError(
                f"the held-out text has {held_out.num_tokens} tokens, fewer than seq_len + 1 = {seq_len + 1}; "
                "raise data.held_out_ratio or lower train.seq_len"
            )
        wanted = min(available, max(self._config.train.eval_tokens // seq_len, 1))
        # All ranks hold equally many sequences at a time, because experts exchange equal parts.
        per_rank = max(wanted // world_size, 1)
        size = min(self._config.sequences_per_micro_step, per_rank)
        first = self._rank * (per_rank - per_rank % size)
        indices = [(first + offset) % available for offset in range(per_rank - per_rank % size)]
        return [self._read(held_out, indices[start : start + size]) for start in range(0, len(indices), size)]

    def _read(self, shards: TokenShards, indices: list[int]) -> Batch:
        samples = [shards.read_sample(index, self._config.train.seq_len) for index in indices]
        tokens = torch.stack([torch.as_tensor(sample[0]) for sample in samples])
        tokens_BS, targets_BS, document_ids_BS = tokens[:, :-1], tokens[:, 1:], None
        if self._config.data.document_boundaries:
            ids = torch.stack([torch.as_tensor(sample[1]) for sample in samples])
            targets_BS = targets_BS.masked_fill(ids[:, 1:] != ids[:, :-1], IGNORED_TARGET)
            document_ids_BS = ids[:, :-1].to(self._device)
        return Batch(tokens_BS.to(self._device), targets_BS.to(self._device), document_ids_BS)
