"""The contiguous KV cache by itself."""

import pytest
import torch

from dsmoe_ray.inference.kv_cache import ContiguousKvCache
from dsmoe_ray.model.config import ModelConfig

CONFIG = ModelConfig.model_validate(
    {
        "vocab_size": 16,
        "d_model": 8,
        "num_layers": 2,
        "max_seq_len": 32,
        "attention": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 4},
        "ffn": {"kind": "dense", "d_ff": 8},
    }
)


def entries(num_new, *, batch_size=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch_size, num_new, 2, 4, generator=generator) for _ in range(2)]


def test_what_was_appended_comes_back_in_order_for_every_layer():
    cache = ContiguousKvCache(CONFIG, max_len=6, batch_size=3)
    first = {layer: entries(4, batch_size=3, seed=layer) for layer in (0, 1)}
    second = {layer: entries(2, batch_size=3, seed=10 + layer) for layer in (0, 1)}
    for layer in (0, 1):
        k, v = cache.append(layer, *first[layer])
        assert torch.equal(k, first[layer][0]) and torch.equal(v, first[layer][1])
    for layer in (0, 1):
        k, v = cache.append(layer, *second[layer])
        assert torch.equal(k, torch.cat([first[layer][0], second[layer][0]], dim=1))
        assert torch.equal(v, torch.cat([first[layer][1], second[layer][1]], dim=1))


def test_positions_count_once_the_last_layer_has_them():
    cache = ContiguousKvCache(CONFIG, max_len=6)
    cache.append(0, *entries(4))
    assert cache.num_cached == 0
    cache.append(1, *entries(4))
    assert cache.num_cached == 4


def test_a_pass_that_failed_in_the_middle_can_be_run_again():
    cache = ContiguousKvCache(CONFIG, max_len=6)
    cache.append(0, *entries(4, seed=1))
    wanted = entries(3, seed=2)
    k, _ = cache.append(0, *wanted)
    assert torch.equal(k, wanted[0])


def test_what_comes_back_is_the_memory_of_the_cache_and_not_a_copy():
    cache = ContiguousKvCache(CONFIG, max_len=6)
    first, _ = cache.append(0, *entries(2))
    again, _ = cache.append(0, *entries(3))
    assert first.data_ptr() == again.data_ptr()
    # Two tensors of 2 layers x 1 sequence x 2 heads x 6 positions x 4 numbers of 4 bytes.
    assert cache.size_bytes == 2 * 2 * 1 * 2 * 6 * 4 * 4


def test_a_full_cache_says_how_full_it_is_and_what_to_change():
    cache = ContiguousKvCache(CONFIG, max_len=6)
    for layer in (0, 1):
        cache.append(layer, *entries(5))
    with pytest.raises(ValueError, match="holds 5 of 6 positions and was given 2 more; make it with a larger max_len"):
        cache.append(0, *entries(2))
    assert cache.num_cached == 5


def test_another_number_of_sequences_is_refused():
    # Without the check one sequence would be broadcast to both.
    with pytest.raises(ValueError, match="for 2 sequences; it was given 1"):
        ContiguousKvCache(CONFIG, max_len=6, batch_size=2).append(0, *entries(1))
