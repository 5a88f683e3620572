"""Text to packed tokens without Ray."""

import logging
from pathlib import Path

import numpy as np
import pytest

from dsmoe_ray.data.config import DataConfig
from dsmoe_ray.data.documents import Document, plan_units
from dsmoe_ray.data.packing import open_or_tokenize, pack_documents, pack_unit, sample_texts
from dsmoe_ray.data.shard_writer import TokenShardWriter
from dsmoe_ray.data.sources import is_held_out, list_sources
from dsmoe_ray.data.tokenizer import TextTokenizer, train_tokenizer
from dsmoe_ray.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["some words to merge, some words to learn"] * 3, vocab_size=280)


@pytest.fixture
def text_files(tmp_path: Path) -> Path:
    directory = tmp_path / "text"
    directory.mkdir()
    for number in range(60):
        (directory / f"{number:02d}.txt").write_text(f"some words in file {number}")
    return directory


def plan(config: DataConfig):
    sources = list_sources(config.paths, include=config.include, exclude=config.exclude)
    return plan_units(sources, text_format=config.format, field=config.field, unit_bytes=100)


def test_packed_documents_end_with_end_of_text_and_keep_their_order(tokenizer):
    texts = ["some words", "to learn", "merge " * 180_000, "the end"]
    packed = pack_documents((Document(text, b"") for text in texts), tokenizer)
    starts = np.cumsum(packed.lengths) - packed.lengths
    for text, start, length in zip(texts, starts, packed.lengths, strict=True):
        ids = packed.tokens[start : start + length]
        assert ids[-1] == 0
        assert tokenizer.decode(ids[:-1].tolist()) == text
    assert packed.lengths.sum() == len(packed.tokens)


def test_a_unit_parts_into_train_and_held_out_by_the_name_of_the_file(tokenizer, text_files):
    config = DataConfig(paths=[str(text_files)], held_out_ratio=0.3)
    unit = [piece for unit in plan(config) for piece in unit]
    train, held_out, accounts = pack_unit(unit, config=config, tokenizer=tokenizer)
    names = [f"{number:02d}.txt" for number in range(60)]
    assert len(held_out.lengths) == sum(is_held_out(name.encode(), 0.3) for name in names) > 0
    assert len(train.lengths) + len(held_out.lengths) == len(accounts) == 60
    assert tokenizer.decode(held_out.tokens.tolist()).startswith("some words in file")


def test_equal_rows_fall_on_the_same_side_wherever_they_stand(tokenizer, tmp_path):
    rows = [f'{{"text": "row {number % 50}"}}' for number in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    config = DataConfig(paths=[str(tmp_path)], format="jsonl", held_out_ratio=0.3)
    unit = [piece for unit in plan(config) for piece in unit]
    sides = [
        set(tokenizer.backend.decode(packed.tokens.tolist(), skip_special_tokens=False).split("<|endoftext|>")[:-1])
        for packed in pack_unit(unit, config=config, tokenizer=tokenizer)[:2]
    ]
    assert len(sides[0]) + len(sides[1]) == 50
    assert sides[1] and not sides[0] & sides[1]


def test_the_tokenizer_sample_is_bounded_repeatable_spread_out_and_free_of_held_out_text(text_files):
    config = DataConfig(paths=[str(text_files)], held_out_ratio=0.3)
    units = plan(config)
    sample = list(sample_texts(units, config=config, max_chars=400))
    assert sum(len(text) for text in sample) == 400
    assert sample == list(sample_texts(units, config=config, max_chars=400))
    assert sample != sorted(sample)
    everything = list(sample_texts(units, config=config, max_chars=10**6))
    held_out = {f"some words in file {n}" for n in range(60) if is_held_out(f"{n:02d}.txt".encode(), 0.3)}
    assert len(everything) == 60 - len(held_out)
    assert not held_out & set(everything)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_evaluation_text_is_read_by_the_suffix_of_its_file(tokenizer, tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    if suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": ["some words"]}), path)
    else:
        path.write_text({".txt": "some words", ".jsonl": '{"text": "some words"}'}[suffix])
    shards = open_or_tokenize(str(path), tokenizer=tokenizer)
    expected = [*tokenizer.encode("some words"), 0]
    assert shards.num_tokens == len(expected)
    assert shards.read_sample(0, len(expected) - 1).tokens.tolist() == expected


def test_evaluation_takes_every_file_of_a_directory_and_reports_the_bad_ones(tokenizer, text_files, caplog):
    (text_files / "bad.txt").write_bytes(b"\xff")
    with caplog.at_level(logging.WARNING):
        shards = open_or_tokenize(str(text_files), tokenizer=tokenizer)
    assert shards.num_documents == 60
    assert "left out 1 bad rows" in caplog.text and "bad.txt" in caplog.text


def test_a_directory_of_token_shards_is_opened_but_not_with_another_tokenizer(tokenizer, tmp_path):
    packed = pack_documents([Document("some words", b"")], tokenizer)
    writer = TokenShardWriter(tmp_path / "held_out", tokenizer=tokenizer, vocab_size=280, shard_tokens=100)
    writer.append(packed.tokens, packed.lengths)
    writer.finish()
    for path in (tmp_path / "held_out", tmp_path):
        assert open_or_tokenize(str(path), tokenizer=tokenizer).num_tokens == len(packed.tokens)
    with pytest.raises(DataError, match="another tokenizer"):
        open_or_tokenize(str(tmp_path), tokenizer=train_tokenizer([], vocab_size=280))


def test_evaluation_without_a_single_document_tells_why(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n' * 3)
    with pytest.raises(DataError, match=r"(?s)no document in .*all 3 rows are bad.*3 x field missing.*it has body"):
        open_or_tokenize(str(tmp_path / "rows.jsonl"), tokenizer=tokenizer)
    with pytest.raises(DataError, match="no file or directory"):
        open_or_tokenize(str(tmp_path / "absent"), tokenizer=tokenizer)
