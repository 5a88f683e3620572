"""The limits of the engine."""

import pytest

from dsmoe_ray.config_io import parse_config
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.inference.config import EngineConfig


def parse(**values):
    return parse_config(values, EngineConfig, source="engine")


def test_every_field_has_a_default_that_works():
    assert parse() == EngineConfig()


def test_a_full_house_of_decoding_sequences_leaves_room_for_a_block_of_prompt():
    assert parse(max_num_seqs=8, block_size=4, max_batched_tokens=12).max_batched_tokens == 12
    with pytest.raises(ConfigError, match=r"max_num_seqs \+ block_size = 12.*got 11"):
        parse(max_num_seqs=8, block_size=4, max_batched_tokens=11)


def test_the_size_of_the_cache_is_given_in_bytes_or_blocks_and_not_both():
    with pytest.raises(ConfigError, match=r"kv_cache_bytes=4096 and num_blocks=3 both give.*leave one out"):
        parse(kv_cache_bytes=4096, num_blocks=3)


def test_bytes_become_the_blocks_that_fit_into_them():
    config = parse(kv_cache_bytes=4095)
    assert config.compute_num_blocks(bytes_per_block=1024, max_seq_len=4096) == 3


def test_no_more_blocks_are_taken_than_the_longest_sequences_fill():
    config = parse(max_num_seqs=3, block_size=16)
    assert config.compute_num_blocks(bytes_per_block=1024, max_seq_len=33) == 9


def test_blocks_that_are_given_are_taken_as_they_are():
    config = parse(num_blocks=1000)
    assert config.compute_num_blocks(bytes_per_block=1 << 40, max_seq_len=16) == 1000


def test_memory_for_less_than_a_block_is_refused_with_what_a_block_takes():
    with pytest.raises(
        ConfigError, match=r"holds no block: one of 16 positions takes 2048 bytes.*Raise kv_cache_bytes"
    ):
        parse(kv_cache_bytes=2047).compute_num_blocks(bytes_per_block=2048, max_seq_len=16)


def test_an_unknown_kind_of_numerics_is_refused():
    with pytest.raises(ConfigError, match="numerics"):
        parse(numerics="quick")
