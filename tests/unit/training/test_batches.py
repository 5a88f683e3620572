"""Which samples each rank reads: a step is the same global batch on any number of ranks."""

import numpy as np
import pytest
import torch

from dsmoe_ray.data.token_shards import SampleOrder, TokenShards
from dsmoe_ray.errors import DataError
from dsmoe_ray.model.losses import IGNORED_TARGET
from dsmoe_ray.training.batches import BatchReader

CPU = torch.device("cpu")
MESHES = {
    1: [],
    2: ["parallel.ep=2"],
    4: ["parallel.ep=2", "parallel.dp_replicate=2"],
    8: ["parallel.ep=2", "parallel.dp_shard=2", "parallel.dp_replicate=2"],
}


def numbered(num_tokens, *, vocab_size=300) -> TokenShards:
    """Return a text whose tokens tell their place, modulo the vocabulary."""
    return TokenShards.from_documents([np.arange(num_tokens) % vocab_size], vocab_size=vocab_size)


def readers(config, data):
    return [BatchReader(config, data, rank=rank, device=CPU) for rank in range(config.parallel.world_size)]


def global_batch(config, data, step) -> torch.Tensor:
    """Return the tokens of all ranks and micro-steps, in order ``(B, S)``."""
    return torch.cat([batch.tokens_BS for reader in readers(config, data) for batch in reader.read_step(step)])


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("step", [0, 3])
def test_any_number_of_ranks_reads_the_same_step(tiny_config, world_size, step):
    data = numbered(1000)
    whole = global_batch(tiny_config(), data, step)
    assert whole.shape == (8, 16)
    assert torch.equal(global_batch(tiny_config(*MESHES[world_size]), data, step), whole)


def test_steps_read_the_run_s_order_without_gap_or_overlap(tiny_config):
    data, config = numbered(1000), tiny_config("run.seed=7")
    order = SampleOrder(num_samples=62, seed=7)
    # 62 samples at 8 a step: the eighth step crosses into the next epoch.
    for step in range(9):
        expected = [data.read_sample(order.sample_index(8 * step + place), 16).tokens[:-1] for place in range(8)]
        assert torch.equal(global_batch(config, data, step), torch.tensor(np.stack(expected)))


@pytest.mark.parametrize("micro_tokens", [16, 32, 64])
def test_micro_steps_cover_the_step(tiny_config, micro_tokens):
    data, mesh = numbered(1000), MESHES[2]
    config = tiny_config(f"train.num_tokens_per_micro_step={micro_tokens}", *mesh)
    for reader in readers(config, data):
        sizes = [batch.tokens_BS.numel() for batch in reader.read_step(1)]
        assert sizes == [micro_tokens] * (64 // micro_tokens)
    assert torch.equal(global_batch(config, data, 1), global_batch(tiny_config(), data, 1))


def test_targets_are_the_tokens_that_come_next(tiny_config):
    [batch] = readers(tiny_config(), numbered(1000))[0].read_step(0)
    assert torch.equal(batch.targets_BS, (batch.tokens_BS + 1) % 300)
    assert batch.document_ids_BS is None


def test_document_boundaries_hide_the_next_document_s_first_token(tiny_config):
    # Documents of 5 tokens; each begins with its number and ends with 0.
    documents = [np.array([number, 100, 101, 102, 0]) for number in range(1, 31)]
    data = TokenShards.from_documents(documents, vocab_size=300)
    config = tiny_config("data.document_boundaries=true")
    [batch] = readers(config, data)[0].read_step(0)
    assert torch.equal(batch.targets_BS == IGNORED_TARGET, batch.tokens_BS == 0)
    kept = batch.targets_BS != IGNORED_TARGET
    [plain] = readers(tiny_config(), data)[0].read_step(0)
    assert torch.equal(batch.targets_BS[kept], plain.targets_BS[kept])
    # Within a row, the id changes exactly after each end of a document.
    changes = batch.document_ids_BS[:, 1:] != batch.document_ids_BS[:, :-1]
    assert torch.equal(changes, batch.tokens_BS[:, :-1] == 0)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("num_samples", [1, 3, 20, 50])
@pytest.mark.parametrize("micro_tokens", [16, None])
def test_held_out_reads_are_equally_large_on_all_ranks(tiny_config, world_size, num_samples, micro_tokens):
    options = [] if micro_tokens is None else [f"train.num_tokens_per_micro_step={micro_tokens}"]
    config = tiny_config("train.eval_tokens=320", *MESHES[world_size], *options)
    held_out = numbered(16 * num_samples + 1)
    by_rank = [reader.read_held_out(held_out) for reader in readers(config, numbered(1000))]
    shapes = [[batch.tokens_BS.shape for batch in batches] for batches in by_rank]
    assert all(found == shapes[0] for found in shapes)
    rows = [tuple(row.tolist()) for batches in by_rank for batch in batches for row in batch.tokens_BS]
    assert 0 < len(rows) <= max(20, world_size)
    if num_samples >= world_size:
        assert len(set(rows)) == len(rows), "a sample counts twice"


def test_held_out_reads_are_the_same_every_time_and_as_long_as_asked(tiny_config):
    config = tiny_config("train.eval_tokens=320")
    first, again = (readers(config, numbered(1000))[0].read_held_out(numbered(900)) for _ in range(2))
    assert all(torch.equal(a.tokens_BS, b.tokens_BS) for a, b in zip(first, again, strict=True))
    # 20 samples asked for, in whole micro-steps of 8.
    assert sum(batch.tokens_BS.numel() for batch in first) == 16 * 16


@pytest.mark.parametrize("num_tokens", [1, 16])
def test_too_little_training_text_is_told(tiny_config, num_tokens):
    with pytest.raises(DataError, match=rf"{num_tokens} tokens, fewer than seq_len \+ 1 = 17"):
        BatchReader(tiny_config(), numbered(num_tokens), rank=0, device=CPU)
    BatchReader(tiny_config(), numbered(17), rank=0, device=CPU)


def test_too_little_held_out_text_is_told(tiny_config):
    [reader] = readers(tiny_config(), numbered(1000))
    with pytest.raises(DataError, match=r"held-out text has 16 tokens, fewer than seq_len \+ 1 = 17"):
        reader.read_held_out(numbered(16))
