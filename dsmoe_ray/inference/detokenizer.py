"""Tokens to text while they come, in pieces that add up to the text of all tokens.

A token may hold part of a character, and with some tokenizers its text depends on the one before it (a leading space).
So tokens are decoded together with those of the last piece, and a text that ends in the replacement character, which is
how a half character shows, is held back until it is whole.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class StreamingDetokenizer:
    """The text of one growing sequence."""

    def __init__(self, decode: Callable[[Sequence[int]], str], *, prompt_ids: Sequence[int] = ()) -> None:
        """Start after the tokens of a prompt, whose text is not given out."""
        self._decode = decode
        self._context = list(prompt_ids)
        """Tokens of the last piece."""
        self._pending: list[int] = []
        """Tokens whose text was not given out yet."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain by now, which may be empty."""
        self._pending.append(token_id)
        piece = self._decode_pending()
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return piece

    def finish(self) -> str:
        """Return what is left when no more tokens come; a half character is a replacement character there."""
        piece = self._decode_pending()
        self._context, self._pending = self._pending, []
        return piece

    def _decode_pending(self) -> str:
        before = self._decode(self._context)
        return self._decode([*self._context, *self._pending])[len(before) :]
