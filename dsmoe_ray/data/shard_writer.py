"""Write a stream of packed documents as a directory of token shards."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from dsmoe_ray.data.shard_index import (
    DOCUMENTS_FILE,
    INDEX_FILE,
    TOKEN_DTYPES,
    ShardFile,
    TokenIndex,
    explain_out_of_vocabulary,
    token_dtype_name,
)
from dsmoe_ray.data.tokenizer import TextTokenizer
from dsmoe_ray.durable import sync_directory, sync_file, to_sealed_json, write_durably
from dsmoe_ray.errors import DataError


class _DigestedFile:
    """A file that is hashed while it is written, so that it need not be read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._stream: IO[bytes] = path.open("xb")
        self._digest = hashlib.sha256()

    def write(self, array: NDArray[Any]) -> None:
        data = array.tobytes()
        self._stream.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)

    def close(self) -> str:
        """Put the file on the disk and return its SHA-256."""
        self._stream.close()
        sync_file(self.path)
        return self._digest.hexdigest()


class TokenShardWriter:
    """Appends documents to a new directory of token shards; without ``finish`` it cannot be opened."""

    def __init__(self, directory: Path, *, tokenizer: TextTokenizer, vocab_size: int, shard_tokens: int) -> None:
        directory.mkdir()
        self._directory, self._tokenizer = directory, tokenizer
        self._vocab_size, self._shard_tokens = vocab_size, shard_tokens
        self._dtype_name = token_dtype_name(vocab_size)
        self._documents = _DigestedFile(directory / DOCUMENTS_FILE)
        self._shards: list[ShardFile] = []
        self._open_file: _DigestedFile | None = None
        self._open_max = 0
        self.num_tokens = 0
        self.num_documents = 0

    def append(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Add consecutive documents, as ``PackedDocuments`` holds them.

        Raises:
            DataError: a token id is not below ``vocab_size``.
        """
        if tokens.max(initial=0) >= self._vocab_size:
            raise DataError(explain_out_of_vocabulary(str(self._directory), int(tokens.max()), self._vocab_size))
        self._documents.write((self.num_tokens + np.cumsum(lengths)).astype("<i8"))
        self.num_documents += len(lengths)
        start = 0
        while start < len(tokens):
            room = self._shard_tokens - self.num_tokens % self._shard_tokens
            self._write(tokens[start : start + room])
            start += room

    def finish(self) -> TokenIndex:
        """Close all files and write the index."""
        self._close_shard()
        index = TokenIndex(
            dtype=self._dtype_name,
            vocab_size=self._vocab_size,
            end_of_text_id=self._tokenizer.end_of_text_id,
            tokenizer_digest=self._tokenizer.digest,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            shards=tuple(self._shards),
            documents_sha256=self._documents.close(),
        )
        write_durably(self._directory / INDEX_FILE, to_sealed_json(asdict(index)))
        sync_directory(self._directory)
        return index

    def _write(self, tokens: NDArray[np.int64]) -> None:
        if self._open_file is None:
            self._open_file = _DigestedFile(self._directory / f"tokens-{len(self._shards):05d}.bin")
            self._open_max = 0
        self._open_file.write(tokens.astype(TOKEN_DTYPES[self._dtype_name]))
        self._open_max = max(self._open_max, int(tokens.max()))
        self.num_tokens += len(tokens)
        if self.num_tokens % self._shard_tokens == 0:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._open_file is None:
            return
        size_bytes = self._open_file.size_bytes
        self._shards.append(
            ShardFile(
                file=self._open_file.path.name,
                num_tokens=size_bytes // TOKEN_DTYPES[self._dtype_name].itemsize,
                size_bytes=size_bytes,
                max_token_id=self._open_max,
                sha256=self._open_file.close(),
            )
        )
        self._open_file = None
