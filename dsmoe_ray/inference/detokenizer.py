"""Tokens to text while they come, in pieces that add up to the text of all tokens.

A token may hold part of a character, and with some tokenizers its text depends on the one before it (a leading space).
So tokens are decoded together with those of the last piece. A half character shows as replacement characters at the end
of the text: one, or one for each of its bytes, which are at most three. So many are held back, until the character is
whole; more of them are bytes that are no text, and all but the last three are given out. Few tokens are decoded at a
time, however long the prompt is and whatever bytes come.
"""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_HALF = 3
"""Bytes of a character that is not whole."""
_MIN_PROMPT_TOKENS, _MAX_PROMPT_TOKENS = 8, 64
"""Tokens of a prompt that are decoded with the first ones after it."""
_MAX_PENDING, _NUM_KEPT = 32, 16
"""So many tokens none of which ends a whole character are cut to the last of them."""


class StreamingDetokenizer:
    """The text of one growing sequence."""

    def __init__(self, decode: Callable[[Sequence[int]], str], *, prompt_ids: Sequence[int] = ()) -> None:
        """Start after the tokens of a prompt, whose text is not given out."""
        self._decode = decode
        self._context = _find_context(decode, prompt_ids)
        """Tokens whose text was given out with the last piece."""
        self._pending: list[int] = []
        """Tokens after them, whose text is not given out or only in part."""
        self._known = self._text = decode(self._context)
        """Text of the context and what of the pending tokens' was given out; and their whole text so far."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain by now, which may be empty."""
        self._pending.append(token_id)
        before, text = self._text, self._decode_all()
        if text == before and self._is_textless(token_id):
            self._pending.pop()
            return ""
        if not text.startswith(self._known):
            # A decoder that wants whole runs of bytes has taken back a character until the next one is whole.
            if len(self._pending) <= _MAX_HALF:
                return ""
            text = self._forget_context()
        num_half = min(len(text) - len(text.rstrip(REPLACEMENT)), _MAX_HALF)
        certain = text[: len(text) - num_half]
        piece = certain[len(self._known) :]
        if piece:
            self._known = certain
        if piece and not num_half:
            self._start_after_pending()
        elif len(self._pending) > _MAX_PENDING:
            self._cut_pending(num_half)
        return piece

    def finish(self) -> str:
        """Return what is left when no more tokens come; a half character is a replacement character there."""
        if not self._pending:
            return ""
        text = self._decode_all()
        if not text.startswith(self._known):
            text = self._forget_context()
        piece = text[len(self._known) :]
        self._start_after_pending()
        return piece

    def _start_after_pending(self) -> None:
        self._context, self._pending = self._pending, []
        self._known = self._text = self._decode(self._context)

    def _decode_all(self) -> str:
        text = self._text = self._decode([*self._context, *self._pending])
        whole = self._known.rstrip(REPLACEMENT)
        if not text.startswith(self._known) and text.startswith(whole):
            # The half character at the prompt's end is whole now.
            self._known = whole
        return text

    def _forget_context(self) -> str:
        """Decode the pending tokens alone from here on."""
        self._context, self._known = [], ""
        return self._decode_all()

    def _is_textless(self, token_id: int) -> bool:
        """Tell whether a token that has not changed the text never will, as the end-of-text token."""
        # At the start of a text it may be a space that shows with the next token.
        return (bool(self._text) or len(self._pending) > _MAX_PENDING) and not self._decode([token_id])

    def _cut_pending(self, num_half: int) -> None:
        kept = self._pending[-_NUM_KEPT:]
        text_of_kept = self._decode(kept)
        # Only the first half character, where the tokens are cut, can have another text than before.
        tail = text_of_kept[_MAX_HALF:]
        if len(tail) > _MAX_HALF and self._text.endswith(tail):
            self._context, self._pending, self._text = [], kept, text_of_kept
            self._known = text_of_kept[: len(text_of_kept) - num_half]


def _find_context(decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> list[int]:
    """Return the last tokens of a prompt, as many as have some text and start with a whole character."""
    context: list[int] = []
    for num_tokens in range(_MIN_PROMPT_TOKENS, _MAX_PROMPT_TOKENS + 1):
        context = list(prompt_ids[-num_tokens:])
        text = decode(context)
        if (text and not text.startswith(REPLACEMENT)) or num_tokens >= len(prompt_ids):
            break
    return context
