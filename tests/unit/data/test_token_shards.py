"""Token shards on disk and in memory, and the order of samples."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.data.shard_index import read_index, verify_token_shards
from dsmoe_ray.data.shard_writer import TokenShardWriter
from dsmoe_ray.data.token_shards import SampleOrder, TokenShards
from dsmoe_ray.data.tokenizer import TextTokenizer, train_tokenizer
from dsmoe_ray.durable import from_sealed_json, to_sealed_json
from dsmoe_ray.errors import DataError

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer([], vocab_size=VOCAB_SIZE)


def make_documents(num_documents: int = 20, *, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, num_documents)
    return [np.append(rng.integers(1, VOCAB_SIZE, length), 0) for length in lengths]


def write(
    directory: Path,
    documents: list[np.ndarray],
    tokenizer: TextTokenizer,
    *,
    vocab_size: int = VOCAB_SIZE,
    shard_tokens: int = 16,
) -> Path:
    writer = TokenShardWriter(directory, tokenizer=tokenizer, vocab_size=vocab_size, shard_tokens=shard_tokens)
    for start in range(0, len(documents), 3):
        group = documents[start : start + 3]
        writer.append(np.concatenate(group), np.array([len(document) for document in group]))
    writer.finish()
    return directory


@pytest.mark.parametrize("shard_tokens", [1, 7, 16, 10_000])
@pytest.mark.parametrize("seq_len", [1, 5, 16])
def test_samples_are_consecutive_windows_of_the_stream_wherever_files_end(tmp_path, tokenizer, shard_tokens, seq_len):
    documents = make_documents()
    stream = np.concatenate(documents)
    owners = np.concatenate([np.full(len(document), index) for index, document in enumerate(documents)])
    shards = TokenShards.open(write(tmp_path / "shards", documents, tokenizer, shard_tokens=shard_tokens))
    assert shards.num_tokens == len(stream)
    assert shards.num_documents == len(documents)
    assert shards.num_samples(seq_len) == (len(stream) - 1) // seq_len
    for index in range(shards.num_samples(seq_len)):
        tokens, document_ids = shards.read_sample(index, seq_len)
        window = slice(index * seq_len, index * seq_len + seq_len + 1)
        np.testing.assert_array_equal(tokens, stream[window])
        np.testing.assert_array_equal(document_ids, owners[window])
        assert tokens.dtype == document_ids.dtype == np.int64
    with pytest.raises(IndexError, match=r"sample \d+ of"):
        shards.read_sample(shards.num_samples(seq_len), seq_len)


def test_shards_in_memory_read_like_those_on_disk(tmp_path, tokenizer):
    documents = make_documents()
    on_disk = TokenShards.open(write(tmp_path / "shards", documents, tokenizer))
    in_memory = TokenShards.from_documents(documents, vocab_size=VOCAB_SIZE)
    for index in range(on_disk.num_samples(8)):
        for mine, theirs in zip(in_memory.read_sample(index, 8), on_disk.read_sample(index, 8), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_the_stream_digest_is_equal_for_equal_tokens_only(tmp_path, tokenizer):
    digests = [
        read_index(write(tmp_path / str(number), documents, tokenizer)).stream_digest
        for number, documents in enumerate([make_documents(), make_documents(), make_documents(seed=1)])
    ]
    assert digests[0] == digests[1] != digests[2]


def test_no_documents_and_too_short_a_stream_are_told():
    with pytest.raises(DataError, match="no document"):
        TokenShards.from_documents([], vocab_size=VOCAB_SIZE)
    short = TokenShards.from_documents([np.array([1, 2, 0])], vocab_size=VOCAB_SIZE)
    assert short.num_samples(2) == 1
    assert short.num_samples(3) == 0
    with pytest.raises(DataError, match=r"shorter than one sample.*train.seq_len"):
        SampleOrder(num_samples=0, seed=0)


@pytest.mark.parametrize(("vocab_size", "dtype", "width"), [(65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_the_vocabulary_decides_the_width_of_a_token(tmp_path, tokenizer, vocab_size, dtype, width):
    documents = [np.array([vocab_size - 1, 0])]
    directory = write(tmp_path / "shards", documents, tokenizer, vocab_size=vocab_size)
    assert read_index(directory).dtype == dtype
    assert (directory / "tokens-00000.bin").stat().st_size == 2 * width
    assert TokenShards.open(directory).read_sample(0, 1).tokens.tolist() == [vocab_size - 1, 0]


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin"])
@pytest.mark.parametrize("damage", ["truncated", "longer", "missing"])
def test_a_file_of_the_wrong_size_is_refused_by_name(tmp_path, tokenizer, name, damage):
    directory = write(tmp_path / "shards", make_documents(), tokenizer)
    path = directory / name
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(data[:-1] if damage == "truncated" else data + b"\0")
    with pytest.raises(DataError, match=f"{name}.*prepare the data again"):
        TokenShards.open(directory)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "documents.bin", "index.json"])
def test_a_flipped_bit_is_found_by_name_when_bytes_are_verified(tmp_path, tokenizer, name):
    directory = write(tmp_path / "shards", make_documents(), tokenizer)
    verify_token_shards(directory)
    data = bytearray((directory / name).read_bytes())
    data[len(data) // 2] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        verify_token_shards(directory)


def test_an_index_of_another_version_or_none_at_all_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"index.json is not a usable index.*No such file"):
        TokenShards.open(tmp_path)
    path = write(tmp_path / "shards", make_documents(), tokenizer) / "index.json"
    path.write_bytes(to_sealed_json({**from_sealed_json(path.read_bytes()), "version": 2}))
    with pytest.raises(DataError, match="format version 2; this program reads 1"):
        TokenShards.open(tmp_path / "shards")


def test_tokens_beyond_the_models_vocabulary_are_refused_when_opened(tmp_path, tokenizer):
    directory = write(tmp_path / "shards", [np.array([5, 250, 0])], tokenizer)
    TokenShards.open(directory, vocab_size=251)
    with pytest.raises(DataError, match=r"tokens-00000.bin holds token id 250, .* below 250"):
        TokenShards.open(directory, vocab_size=250)


def test_a_token_beyond_the_vocabulary_that_came_into_a_file_later_is_refused_when_read(tmp_path, tokenizer):
    directory = write(tmp_path / "shards", make_documents(), tokenizer)
    np.memmap(directory / "tokens-00001.bin", dtype="<u2", mode="r+")[3] = VOCAB_SIZE
    shards = TokenShards.open(directory)
    shards.read_sample(0, 8)
    with pytest.raises(DataError, match=r"tokens-00001.bin holds token id 300"):
        shards.read_sample(2, 8)


def test_a_token_beyond_the_vocabulary_is_never_written(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"holds token id 300"):
        write(tmp_path / "shards", [np.array([VOCAB_SIZE, 0])], tokenizer)


def test_tokens_of_another_tokenizer_are_refused(tmp_path, tokenizer):
    directory = write(tmp_path / "shards", make_documents(), tokenizer)
    TokenShards.open(directory, tokenizer_digest=tokenizer.digest)
    with pytest.raises(DataError, match="another tokenizer"):
        TokenShards.open(directory, tokenizer_digest="0" * 64)


@settings(max_examples=60, deadline=None)
@given(num_samples=st.integers(1, 700), seed=st.integers(0, 2**63), epoch=st.integers(0, 5))
def test_every_epoch_draws_every_sample_once(num_samples, seed, epoch):
    order = SampleOrder(num_samples=num_samples, seed=seed)
    drawn = [order.sample_index(epoch * num_samples + place) for place in range(num_samples)]
    assert sorted(drawn) == list(range(num_samples))


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_that_was_drawn_before():
    order = SampleOrder(num_samples=1000, seed=1)
    first = [order.sample_index(place) for place in range(2000)]
    fresh = SampleOrder(num_samples=1000, seed=1)
    assert [fresh.sample_index(place) for place in reversed(range(2000))] == first[::-1]
    assert first[:1000] != first[1000:]
    assert first[:1000] != [SampleOrder(num_samples=1000, seed=2).sample_index(place) for place in range(1000)]


def test_the_order_never_changes():
    # A changed order would repeat and skip samples when a run is resumed with a newer version.
    order = SampleOrder(num_samples=10, seed=0)
    assert [order.sample_index(place) for place in range(10)] == [6, 5, 8, 0, 2, 1, 3, 4, 9, 7]


def test_the_order_is_shuffled_evenly():
    num_samples, num_epochs = 50, 2000
    counts = Counter(
        SampleOrder(num_samples=num_samples, seed=3).sample_index(epoch * num_samples + 7)
        for epoch in range(num_epochs)
    )
    expected = num_epochs / num_samples
    chi_squared = sum((counts[sample] - expected) ** 2 / expected for sample in range(num_samples))
    # 49 degrees of freedom: above 102 once in 100000 shuffles that are truly even.
    assert chi_squared < 102
    large = SampleOrder(num_samples=100_003, seed=3)
    drawn = np.array([large.sample_index(place) for place in range(20_000)])
    # Correlations of neighbours and with the place itself; four standard deviations, 1 / sqrt(20000) = 0.007.
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.028
    assert abs(np.corrcoef(drawn, np.arange(20_000))[0, 1]) < 0.028
