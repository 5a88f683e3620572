"""Documents to packed tokens, without Ray: what one worker does with one unit, and what evaluation does on the fly."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from dsmoe_ray.config_io import parse_config
from dsmoe_ray.data.bad_rows import BadRows, SliceAccount, read_documents, tally
from dsmoe_ray.data.config import DataConfig, TextFormat
from dsmoe_ray.data.documents import Document, Slice, plan_units
from dsmoe_ray.data.prepared import HELD_OUT_DIR
from dsmoe_ray.data.shard_index import INDEX_FILE
from dsmoe_ray.data.sources import expand_path, hash_unit, is_held_out, list_sources
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.data.tokenizer import TextTokenizer
from dsmoe_ray.errors import DataError

logger = logging.getLogger(__name__)

_BATCH_CHARS = 1 << 20
_MAX_SAMPLE_CHARS_PER_SLICE = 1 << 20
_FORMATS: dict[str, TextFormat] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


@dataclass(frozen=True)
class PackedDocuments:
    """Tokens of consecutive documents, each ending with the end-of-text token."""

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int64]
    """Tokens of each document; their sum is the length of ``tokens``."""


def pack_documents(documents: Iterable[Document], tokenizer: TextTokenizer) -> PackedDocuments:
    """Tokenize documents in order."""
    end = np.array([tokenizer.end_of_text_id], dtype=np.int64)
    parts = [np.append(ids, end) for batch in _batches(documents) for ids in tokenizer.encode_batch(batch)]
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return PackedDocuments(np.concatenate(parts) if parts else end[:0], lengths)


def pack_unit(
    unit: Sequence[Slice], *, config: DataConfig, tokenizer: TextTokenizer
) -> tuple[PackedDocuments, PackedDocuments, list[SliceAccount]]:
    """Read and tokenize a unit.

    Returns:
        The documents to train on, the held-out ones, and an account of each slice.
    """
    accounts: list[SliceAccount] = []
    train: list[Document] = []
    held_out: list[Document] = []
    for document in _read_unit(unit, config.format, config.field, accounts):
        split = held_out if is_held_out(document.identity, config.held_out_ratio) else train
        split.append(document)
    return pack_documents(train, tokenizer), pack_documents(held_out, tokenizer), accounts


def sample_texts(units: Sequence[Sequence[Slice]], *, config: DataConfig, max_chars: int) -> Iterator[str]:
    """Yield documents to train a tokenizer on, up to ``max_chars``: none held out, the same ones every time.

    Slices are taken in the order of a hash, so that the sample is spread over the corpus.
    """
    slices = sorted(chain.from_iterable(units), key=lambda piece: hash_unit(f"{piece.path}:{piece.start}".encode()))
    left = max_chars
    for piece in slices:
        left_of_slice = min(left, _MAX_SAMPLE_CHARS_PER_SLICE)
        for document in read_documents(piece, text_format=config.format, field=config.field, accounts=[]):
            if is_held_out(document.identity, config.held_out_ratio):
                continue
            text = document.text[:left_of_slice]
            yield text
            left -= len(text)
            left_of_slice -= len(text)
            if left_of_slice <= 0:
                break
        if left <= 0:
            return


def open_or_tokenize(
    path: str,
    *,
    tokenizer: TextTokenizer,
    vocab_size: int | None = None,
    text_format: TextFormat | None = None,
    field: str = "text",
    include: str = "*",
    exclude: Sequence[str] = (),
) -> TokenShards:
    """Return the tokens behind a path a person gave: text is tokenized in memory, prepared data is opened.

    Args:
        path: A file or directory of text, a directory of token shards, or a prepared one (its held-out part is taken).
        tokenizer: The model's; shards made with another one are refused.
        vocab_size: Rows of the model's embedding, by default the size of the tokenizer's vocabulary.
        text_format: By default what the suffix of the file says, and ``text`` for all others.
        field: JSONL key or parquet column that holds the text.
        include: Glob for the names of files in a directory.
        exclude: Names of sub-directories to leave out.

    Raises:
        ConfigError: the path or a pattern is not a possible one.
        DataError: there is no text, or not the model's tokens.
    """
    limit = tokenizer.vocab_size if vocab_size is None else vocab_size
    directory = expand_path(path)
    for candidate in (directory, directory / HELD_OUT_DIR):
        if (candidate / INDEX_FILE).is_file():
            return TokenShards.open(candidate, vocab_size=limit, tokenizer_digest=tokenizer.digest)
    values = {
        "paths": [path],
        "format": text_format or _FORMATS.get(directory.suffix.lower(), "text"),
        "field": field,
        "include": include,
        "exclude": list(exclude),
    }
    config = parse_config(values, DataConfig, source=f"the data {path!r}")
    return token_shards_from_text(config, tokenizer=tokenizer, vocab_size=limit)


def token_shards_from_text(config: DataConfig, *, tokenizer: TextTokenizer, vocab_size: int) -> TokenShards:
    """Read and tokenize all text of ``config`` into memory, nothing held out; bad rows are logged and left out.

    Raises:
        DataError: a path or column is missing, or there is no text.
    """
    sources = list_sources(config.paths, include=config.include, exclude=config.exclude)
    units = plan_units(sources, text_format=config.format, field=config.field, unit_bytes=_BATCH_CHARS)
    accounts: list[SliceAccount] = []
    slices = list(chain.from_iterable(units))
    packed = pack_documents(_read_unit(slices, config.format, config.field, accounts), tokenizer)
    bad_rows = tally(accounts)
    if not len(packed.lengths):
        raise DataError(explain_empty(config, bad_rows))
    if bad_rows.total:
        logger.warning("left out %d bad rows:\n%s", bad_rows.total, bad_rows.describe())
    return TokenShards.from_packed(packed.tokens, packed.lengths, vocab_size=vocab_size)


def explain_empty(config: DataConfig, bad_rows: BadRows) -> str:
    """Return the message for a corpus without a single document."""
    found = f"all {bad_rows.total} rows are bad:\n{bad_rows.describe()}" if bad_rows.total else "its files are empty."
    return (
        f"no document in {', '.join(config.paths)} (format {config.format}, include {config.include!r}, "
        f"field {config.field!r}): {found}\nCorrect data.paths, data.format, data.include or data.field."
    )


def _read_unit(
    unit: Sequence[Slice], text_format: TextFormat, field: str, accounts: list[SliceAccount]
) -> Iterator[Document]:
    for piece in unit:
        yield from read_documents(piece, text_format=text_format, field=field, accounts=accounts)


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """Group texts to about a megabyte: enough to keep all cores busy, little enough to hold."""
    batch: list[str] = []
    num_chars = 0
    for document in documents:
        batch.append(document.text)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
