"""What a directory of token shards holds, and whether it is still what was written.

- ``index.json``: sealed with a digest of itself; sizes and digests of the other files, the type of a token, the
  vocabulary the tokens belong to, counts;
- ``tokens-00000.bin``, ...: the stream cut into files, little-endian uint16 or uint32, no header;
- ``documents.bin``: for each document the position after its last token, which is the end-of-text token; little-endian
  int64. A file and not a list in the index, because a large corpus has hundreds of millions.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsmoe_ray.durable import digest_file, from_sealed_json
from dsmoe_ray.errors import DataError

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
DOCUMENTS_FILE = "documents.bin"
TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_REMEDY = "Delete the directory and prepare the data again."


def token_dtype_name(vocab_size: int) -> str:
    """Return the name of the smallest type that holds every id below ``vocab_size``."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class ShardFile:
    """One file of tokens, as the index describes it."""

    file: str
    num_tokens: int
    size_bytes: int
    max_token_id: int
    sha256: str


@dataclass(frozen=True)
class TokenIndex:
    """What ``index.json`` holds."""

    dtype: str
    vocab_size: int
    end_of_text_id: int
    tokenizer_digest: str
    """``TextTokenizer.digest`` of the tokenizer that made the tokens."""
    num_tokens: int
    num_documents: int
    shards: tuple[ShardFile, ...]
    documents_sha256: str
    version: int = FORMAT_VERSION

    @property
    def stream_digest(self) -> str:
        """Return a SHA-256 that is equal for equal tokens: a run that goes on must find what it began with."""
        digests = [self.documents_sha256, *(shard.sha256 for shard in self.shards)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_index(directory: Path) -> TokenIndex:
    """Read the index of a directory of token shards.

    Raises:
        DataError: it is missing, damaged, or of a version this program does not know.
    """
    path = directory / INDEX_FILE
    try:
        fields = from_sealed_json(path.read_bytes())
        version = fields.get("version")
        if version != FORMAT_VERSION:
            raise ValueError(f"it has format version {version}; this program reads {FORMAT_VERSION}")
        fields["shards"] = tuple(ShardFile(**shard) for shard in fields["shards"])
        return TokenIndex(**fields)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is not a usable index of token shards: {error}. {_REMEDY}") from error


def verify_token_shards(directory: Path) -> None:
    """Compare every file of a directory of token shards with the digests in its index.

    Raises:
        DataError: a file is missing or differs; names it.
    """
    index = read_index(directory)
    expected = {shard.file: shard.sha256 for shard in index.shards} | {DOCUMENTS_FILE: index.documents_sha256}
    for name, sha256 in expected.items():
        path = directory / name
        try:
            found = digest_file(path).sha256
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}. {_REMEDY}") from error
        if found != sha256:
            raise DataError(f"{path} has changed since it was written: SHA-256 {found}, not {sha256}. {_REMEDY}")


def check_tokens(index: TokenIndex, directory: Path, *, vocab_size: int | None, tokenizer_digest: str | None) -> None:
    """Refuse no tokens, tokens not below ``vocab_size``, and those of another tokenizer; None asks for nothing."""
    limit = index.vocab_size if vocab_size is None else vocab_size
    for shard in index.shards:
        if shard.max_token_id >= limit:
            raise DataError(explain_out_of_vocabulary(str(directory / shard.file), shard.max_token_id, limit))
    if not (index.num_tokens and index.num_documents):
        raise DataError(f"{directory} holds no tokens. {_REMEDY}")
    if tokenizer_digest is not None and tokenizer_digest != index.tokenizer_digest:
        raise DataError(
            f"the tokens in {directory} were made by another tokenizer than the model's. Give the text itself, or "
            "shards prepared with the model's tokenizer."
        )


def check_size(path: Path, *, expected_bytes: int) -> None:
    """Refuse a file that is missing or of another size than the index says."""
    try:
        found_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}. {_REMEDY}") from error
    if found_bytes != expected_bytes:
        raise DataError(f"{path} has {found_bytes} bytes; its index says {expected_bytes}. {_REMEDY}")


def explain_out_of_vocabulary(name: str, token_id: int, vocab_size: int) -> str:
    """Return the message for a token that the model has no embedding for."""
    return (
        f"{name} holds token id {token_id}, but the vocabulary has ids below {vocab_size} only. Prepare the data again "
        "with the model's tokenizer, or correct model.vocab_size."
    )
