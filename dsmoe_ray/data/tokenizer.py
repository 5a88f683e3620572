"""Text to token ids and back: a ``tokenizer.json`` that a person has, or a byte-level BPE trained on their data.

Knows no corpus and no Ray. A document's text never yields the end-of-text token, even if it spells it; the one who
packs documents puts it between them.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsmoe_ray.errors import DataError

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; id 0 in the tokenizers we train."""
_OTHER_ENDS_OF_TEXT = ("<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_BYTE_LEVEL_SIZE = 1 + 256

_PIECE_CHARS = 1 << 20
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
"""One byte, where a vocabulary of characters falls back to bytes."""
_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer whose ids fit a model, with the token that ends a document."""

    backend: Tokenizer
    end_of_text_id: int
    other_end_ids: tuple[int, ...] = ()
    """More tokens that end a text, such as one that ends a turn of a conversation."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return every token that ends a text."""
        return (self.end_of_text_id, *self.other_end_ids)

    @cached_property
    def vocab_size(self) -> int:
        """Return one more than the largest id, which is more than the number of tokens if ids have gaps."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def digest(self) -> str:
        """Return a SHA-256 of which id means which token; two files that say the same in other words agree."""
        vocabulary = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Return the ids of special tokens by their names, which no text yields."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of a text, without the end-of-text token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Return the ids of each text; uses all cores unless ``TOKENIZERS_PARALLELISM`` is ``false``."""
        pieces = [list(_split(text)) for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        encodings = iter(self.backend.encode_batch_fast(flat, add_special_tokens=False))
        return [
            np.concatenate([np.asarray(next(encodings).ids, dtype=np.int64) for _ in of_text]) for of_text in pieces
        ]

    def encode_with_special(self, text: str) -> list[int]:
        """Return the ids of a text in which names of special tokens are those tokens: a trusted one."""
        return self._special_backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def _special_backend(self) -> Tokenizer:
        # The setting belongs to a whole tokenizer, which other threads may be using.
        backend = Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids; the end-of-text token gives none."""
        pieces = self._bytes_of_tokens
        if pieces is None:
            return self.backend.decode([int(token) for token in ids], skip_special_tokens=True)
        return b"".join([pieces.get(token, b"") for token in ids]).decode(errors="replace")

    @cached_property
    def _bytes_of_tokens(self) -> dict[int, bytes] | None:
        """Bytes of each token, if a text is just those of its tokens: many times faster than the library's decoder.

        Streaming decodes after every token, when the weights of a whole model have just gone through the caches.
        """
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return None
        special = set(self.special_ids.values())
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return {token_id: _to_bytes(token) for token, token_id in vocabulary.items() if token_id not in special}

    @cached_property
    def longest_token_bytes(self) -> int | None:
        """Return the length of the longest token; None if a text need not have the length of its tokens together."""
        is_plain = self._bytes_of_tokens is not None and self.backend.normalizer is None
        return max(map(len, self._bytes_of_tokens.values())) if is_plain and self._bytes_of_tokens else None

    def bytes_of(self, token_id: int) -> bytes:
        """Return what a token adds to a text before it, maybe a part of a character; nothing for a special token."""
        if self._bytes_of_tokens is not None:
            return self._bytes_of_tokens.get(token_id, b"")
        token = self.backend.id_to_token(token_id)
        if token is None or token in self.special_ids:
            return b""
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        # At the start of a text a decoder may drop a space.
        before = self.encode("a")[-1:].tolist()
        return self.decode([*before, token_id])[len(self.decode(before)) :].encode()

    def to_json(self) -> str:
        """Return the content of a ``tokenizer.json``."""
        return self.backend.to_str(pretty=True)


def _byte_of_characters() -> dict[str, int]:
    """Return which byte each character of a byte-level vocabulary stands for.

    Printable Latin-1 characters stand for themselves, and the other bytes, in order, for those from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_characters()


def _to_bytes(token: str) -> bytes:
    """Return the bytes of one token of a byte-level vocabulary; an added token may be plain text."""
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:
        return token.encode()


def load_tokenizer(path: Path, *, vocab_size: int | None = None) -> TextTokenizer:
    """Read a ``tokenizer.json``.

    Args:
        path: The file.
        vocab_size: Rows of the model's embedding; every id must be below it. None asks for nothing.

    Raises:
        DataError: the file is missing or no tokenizer, has no token that ends a text, or has ids the model has not.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the tokenizer {path}: {error}. Give the path of a tokenizer.json.") from error
    return parse_tokenizer(text, source=str(path), vocab_size=vocab_size)


def parse_tokenizer(
    text: str, *, source: str, vocab_size: int | None = None, end_ids: Sequence[int] = ()
) -> TextTokenizer:
    """Do as ``load_tokenizer`` with the content of a ``tokenizer.json``.

    Args:
        text: The content.
        source: Names it in errors.
        vocab_size: See ``load_tokenizer``.
        end_ids: Tokens that end a text, the one that parts documents first; by default it is found by its name.

    Raises:
        DataError: see ``load_tokenizer``.
    """
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # The binding raises nothing narrower.
        raise DataError(f"{source} is not a tokenizer.json of the `tokenizers` library: {error}") from error
    # What the file says about batches of prompts must not cut or pad documents.
    backend.no_truncation()
    backend.no_padding()
    return _wrap(backend, source=source, vocab_size=vocab_size, end_ids=end_ids)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """Train a byte-level BPE of exactly ``vocab_size`` tokens.

    Bytes are tokens, so every text can be told. If the texts run out of pairs to merge, the rest of the vocabulary is
    filled with reserved tokens that no text yields. The same texts in the same order give the same tokenizer.

    Raises:
        DataError: ``vocab_size`` has no room for the bytes and the end-of-text token.
    """
    if vocab_size < _BYTE_LEVEL_SIZE:
        raise DataError(
            f"model.vocab_size={vocab_size} is too small for a byte-level tokenizer: it needs at least "
            f"{_BYTE_LEVEL_SIZE} (256 bytes and {END_OF_TEXT}). Raise model.vocab_size or set data.tokenizer."
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    num_missing = vocab_size - backend.get_vocab_size()
    backend.add_special_tokens([f"<|reserved_{index}|>" for index in range(num_missing)])
    return _wrap(backend, source="the trained tokenizer", vocab_size=vocab_size)


def _wrap(backend: Tokenizer, *, source: str, vocab_size: int | None, end_ids: Sequence[int] = ()) -> TextTokenizer:
    # A text that spells a special token, as this file does, must not end its document.
    backend.encode_special_tokens = True
    first, *others = end_ids or [_find_end_of_text(backend, source=source)]
    tokenizer = TextTokenizer(backend, first, tuple(others))
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"{source} has ids up to {tokenizer.vocab_size - 1}, but model.vocab_size={vocab_size} allows ids below "
            f"{vocab_size}. Set model.vocab_size to at least {tokenizer.vocab_size}, or use a smaller tokenizer."
        )
    return tokenizer


def _find_end_of_text(backend: Tokenizer, *, source: str) -> int:
    names = (END_OF_TEXT, *_OTHER_ENDS_OF_TEXT)
    for name in names:
        token_id = backend.token_to_id(name)
        if token_id is not None:
            return token_id
    raise DataError(
        f"{source} has no token that ends a text; it needs one of {', '.join(names)}. Add {END_OF_TEXT} to it."
    )


def _split(text: str) -> Iterator[str]:
    """Cut a long text where a byte-level tokenizer never merges: before a lone space, or after a lone line end.

    In one piece a file of a gigabyte would not do: while it is made, an encoding costs about a hundred bytes a token.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        cut = _CUT.search(text, start + _PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]
