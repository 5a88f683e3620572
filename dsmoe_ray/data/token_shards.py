"""Tokens of many documents as one packed stream in memory-mapped files, and the order samples are drawn in.

A sample is a window of the stream, so it may hold several documents and lie in two files. ``SampleOrder`` shuffles
samples with a Feistel network over the numbers ``[0, num_samples)``: a permutation that is computed for one sample at a
time from (seed, epoch). There is no state to save, resume needs no replay, memory does not grow with the corpus, and
unlike a permutation drawn with numpy it cannot change with the version of a library in the middle of a run.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsmoe_ray.data.shard_index import (
    DOCUMENTS_FILE,
    TOKEN_DTYPES,
    check_size,
    check_tokens,
    explain_out_of_vocabulary,
    read_index,
    token_dtype_name,
)
from dsmoe_ray.errors import DataError


class Sample(NamedTuple):
    """A window of the stream; S = seq_len."""

    tokens: NDArray[np.int64]
    """Ids ``(S + 1,)``: inputs are all but the last, targets all but the first."""
    document_ids: NDArray[np.int64]
    """For each token the document it belongs to, counted over the whole stream, ``(S + 1,)``."""


class TokenShards:
    """A packed stream of tokens, on disk or in memory, read as samples."""

    def __init__(
        self,
        parts: Sequence[NDArray[Any]],
        document_ends: NDArray[np.int64],
        *,
        vocab_size: int,
        names: Sequence[str] = (),
        stream_digest: str = "",
    ) -> None:
        """Take the parts of the stream in order; ``open`` and ``from_documents`` are the usual ways here."""
        self._parts = parts
        self._part_ends = list(accumulate(len(part) for part in parts))
        self._names = names or [f"part {index} in memory" for index in range(len(parts))]
        self._document_ends = document_ends
        self.vocab_size = vocab_size
        self.stream_digest = stream_digest
        """Tells one prepared stream from another; empty for tokens in memory."""

    @classmethod
    def open(
        cls, directory: Path, *, vocab_size: int | None = None, tokenizer_digest: str | None = None
    ) -> "TokenShards":
        """Memory-map a directory of token shards.

        Checks the index and the size of every file, but reads no tokens; ``read_sample`` checks the ids it returns, and
        ``verify_token_shards`` every byte.

        Args:
            directory: What ``prepare_data`` left as ``train`` or ``held_out``.
            vocab_size: Rows of the model's embedding; every id must be below it.
            tokenizer_digest: The tokenizer of the model; tokens made by another one are refused.

        Raises:
            DataError: a file is missing, damaged or truncated, or the tokens are not the model's; names the file.
        """
        index = read_index(directory)
        check_tokens(index, directory, vocab_size=vocab_size, tokenizer_digest=tokenizer_digest)
        parts = []
        for shard in index.shards:
            path = directory / shard.file
            check_size(path, expected_bytes=shard.size_bytes)
            parts.append(np.memmap(path, dtype=TOKEN_DTYPES[index.dtype], mode="r", shape=(shard.num_tokens,)))
        documents = directory / DOCUMENTS_FILE
        check_size(documents, expected_bytes=8 * index.num_documents)
        document_ends = np.memmap(documents, dtype="<i8", mode="r", shape=(index.num_documents,))
        names = [str(directory / shard.file) for shard in index.shards]
        return cls(
            parts,
            document_ends,
            vocab_size=vocab_size or index.vocab_size,
            names=names,
            stream_digest=index.stream_digest,
        )

    @classmethod
    def from_documents(cls, documents: Iterable[NDArray[Any]], *, vocab_size: int) -> "TokenShards":
        """Pack documents in memory; each must be non-empty and end with the end-of-text token.

        Raises:
            DataError: there is no document.
        """
        parts = list(documents)
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return cls.from_packed(np.concatenate(parts) if parts else lengths, lengths, vocab_size=vocab_size)

    @classmethod
    def from_packed(cls, tokens: NDArray[Any], lengths: NDArray[np.int64], *, vocab_size: int) -> "TokenShards":
        """Do as ``from_documents`` with documents already joined; ``lengths`` has the tokens of each."""
        if not len(lengths):
            raise DataError("there is no document to make samples from. Give data that holds text.")
        dtype = TOKEN_DTYPES[token_dtype_name(vocab_size)]
        return cls([tokens.astype(dtype)], np.cumsum(lengths), vocab_size=vocab_size)

    @property
    def num_tokens(self) -> int:
        """Return the length of the stream."""
        return self._part_ends[-1] if self._part_ends else 0

    @property
    def num_documents(self) -> int:
        """Return how many documents the stream holds."""
        return len(self._document_ends)

    def num_samples(self, seq_len: int) -> int:
        """Return how many whole samples of ``seq_len + 1`` tokens the stream holds; neighbours share one token."""
        return max(self.num_tokens - 1, 0) // seq_len

    def read_sample(self, sample_index: int, seq_len: int) -> Sample:
        """Return the sample that begins at token ``sample_index * seq_len``.

        Raises:
            IndexError: there is no such sample.
            DataError: a token id is not below ``vocab_size``; names the file.
        """
        num_samples = self.num_samples(seq_len)
        if not 0 <= sample_index < num_samples:
            raise IndexError(f"sample {sample_index} of {num_samples} (seq_len={seq_len})")
        start = sample_index * seq_len
        stop = start + seq_len + 1
        return Sample(self._read_tokens(start, stop), self._read_document_ids(start, stop))

    def _read_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        tokens_S = np.empty(stop - start, dtype=np.int64)
        position = start
        part_idx = bisect_right(self._part_ends, start)
        while position < stop:
            part_start = self._part_ends[part_idx] - len(self._parts[part_idx])
            part_stop = min(stop, self._part_ends[part_idx])
            piece_S = self._parts[part_idx][position - part_start : part_stop - part_start]
            largest = int(piece_S.max(initial=0))
            if largest >= self.vocab_size:
                raise DataError(explain_out_of_vocabulary(self._names[part_idx], largest, self.vocab_size))
            tokens_S[position - start : part_stop - start] = piece_S
            position = part_stop
            part_idx += 1
        return tokens_S

    def _read_document_ids(self, start: int, stop: int) -> NDArray[np.int64]:
        first, last = np.searchsorted(self._document_ends, [start, stop - 1], side="right")
        # Search among the few documents of the window only: the whole list may be larger than memory.
        ends = self._document_ends[first : last + 1]
        return first + np.searchsorted(ends, np.arange(start, stop), side="right").astype(np.int64)


@dataclass(frozen=True)
class SampleOrder:
    """Which sample a run reads when: every sample once in each epoch, a new order in every epoch.

    A pure function of the seed and the global sample index, so it neither repeats nor skips after a resume.
    """

    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError("the data is shorter than one sample. Lower train.seq_len, or give more data.")

    def sample_index(self, global_index: int) -> int:
        """Return the sample in ``[0, num_samples)`` that comes at a place of the run's endless sequence of samples."""
        epoch, index = divmod(global_index, self.num_samples)
        keys = _round_keys(self.seed, epoch)
        index = _permute_once(index, self.num_samples, keys)
        # The network permutes a range a little larger; walking on until we are back inside keeps it a permutation.
        while index >= self.num_samples:
            index = _permute_once(index, self.num_samples, keys)
        return index


_MASK = (1 << 64) - 1
_NUM_ROUNDS = 8


def _permute_once(index: int, num_samples: int, keys: tuple[int, ...]) -> int:
    """Permute ``[0, a * b)``, the smallest near-square range that holds all samples, by a Feistel network.

    Source:
        Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (generalized Feistel, cycle walking).
    """
    a = isqrt(num_samples - 1) + 1
    b = -(-num_samples // a)
    left, right = index % a, index // a
    for round_idx, key in enumerate(keys):
        if round_idx % 2 == 0:
            left = (left + _mix(key ^ right)) % a
        else:
            right = (right + _mix(key ^ left)) % b
    return right * a + left


def _mix(value: int) -> int:
    """Scramble 64 bits (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


@lru_cache(maxsize=16)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return tuple(int.from_bytes(digest[start : start + 8], "little") for start in range(0, len(digest), 8))
