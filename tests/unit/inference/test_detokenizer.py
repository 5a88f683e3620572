"""Pieces of text while tokens come: whole characters only, and all of the text."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsmoe_ray.data.tokenizer import TextTokenizer, train_tokenizer
from dsmoe_ray.inference.detokenizer import REPLACEMENT, StreamingDetokenizer

# Characters of two, three and four bytes, so frequent that some merges hold parts of them.
WORDS = "na\xefve caf\xe9 \xfcber stra\xdfe \u6f22\u5b57\u4eee\u540d \U0001f642\U0001f643\U0001f680 "
CORPUS = [WORDS * 3, "def f(x): return x + 1\n" * 5]
# The four bytes of MONKEY, as byte-level tokens are named.
MONKEY, MONKEY_TOKENS = "\U0001f64a", "\xf0\u0141\u013b\u012c"


@functools.cache
def tokenizer() -> TextTokenizer:
    return train_tokenizer(CORPUS, vocab_size=300)


def stream(ids, *, decode=None, prompt_ids=()):
    detokenizer = StreamingDetokenizer(decode or tokenizer().decode, prompt_ids=prompt_ids)
    pieces = [detokenizer.push(token) for token in ids]
    return pieces, detokenizer.finish()


def test_a_character_of_four_tokens_comes_out_whole_with_its_last():
    ids = [tokenizer().backend.token_to_id(name) for name in MONKEY_TOKENS]
    assert stream(ids) == (["", "", "", MONKEY], "")


def test_text_before_a_half_character_is_not_lost():
    ids = [*tokenizer().encode("x + 1 "), *(tokenizer().backend.token_to_id(name) for name in MONKEY_TOKENS[:2])]
    pieces, rest = stream(ids)
    assert "".join(pieces) == "x + 1 " and rest == REPLACEMENT


def test_bytes_that_are_no_text_are_not_held_back_for_ever():
    continuation = tokenizer().backend.token_to_id("\u0122")
    assert tokenizer().decode([continuation]) == REPLACEMENT
    pieces, rest = stream([continuation] * 100)
    assert pieces == ["", "", "", *[REPLACEMENT] * 97] and rest == REPLACEMENT * 3


@settings(deadline=None)
@given(st.text())
def test_pieces_of_any_text_add_up_to_it(text):
    pieces, rest = stream(tokenizer().encode(text))
    assert "".join(pieces) + rest == text
    # A replacement character that the text itself holds may only come late.
    assert rest.strip(REPLACEMENT) == ""


@functools.cache
def half_ids() -> list[int]:
    """Tokens that are no text alone."""
    return [token_id for token_id in range(300) if REPLACEMENT in tokenizer().decode([token_id])]


ANY_TOKENS = st.lists(st.integers(0, 299)) | st.lists(
    st.deferred(lambda: st.sampled_from(half_ids()) | st.integers(0, 299)), max_size=120
)


@settings(deadline=None)
@given(ANY_TOKENS, st.lists(st.integers(0, 299), max_size=8))
def test_pieces_of_any_tokens_add_up_to_what_they_mean_together(ids, prompt_ids):
    """A model may emit bytes that are no text at all."""
    # A prompt is text, so it ends with a whole character.
    prompt_ids = list(tokenizer().encode(tokenizer().decode(prompt_ids)))
    pieces, rest = stream(ids, prompt_ids=prompt_ids)
    prompt = tokenizer().decode(prompt_ids)
    assert prompt + "".join(pieces) + rest == tokenizer().decode([*prompt_ids, *ids])


@settings(deadline=None)
@given(ANY_TOKENS)
def test_a_piece_is_out_as_soon_as_its_characters_are_and_none_is_half_a_character(ids):
    detokenizer, given_out, whole = StreamingDetokenizer(tokenizer().decode), "", tokenizer().decode(ids)
    for count, token in enumerate(ids, start=1):
        given_out += detokenizer.push(token)
        so_far = tokenizer().decode(ids[:count])
        held = so_far[len(given_out) :]
        assert whole.startswith(given_out) and so_far.startswith(given_out)
        assert held == REPLACEMENT * len(held) and len(held) <= 3


@pytest.mark.parametrize("repeated", [[0], [200], [260, 0], "every half"], ids=str)
def test_few_tokens_are_decoded_at_a_time_whatever_comes(repeated):
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return tokenizer().decode(ids)

    repeated = half_ids() if repeated == "every half" else repeated
    prompt_ids = list(tokenizer().encode("def f(x): return x" * 100))
    pieces, rest = stream(repeated * 300, decode=decode, prompt_ids=prompt_ids)
    assert "".join(pieces) + rest == tokenizer().decode(repeated * 300)
    assert max(lengths) <= 80


def test_half_a_character_at_the_end_of_a_prompt_is_made_whole():
    monkey = [tokenizer().backend.token_to_id(name) for name in MONKEY_TOKENS]
    for count in (1, 2, 3):
        pieces, rest = stream(monkey[count:], prompt_ids=[*tokenizer().encode("a "), *monkey[:count]])
        assert "".join(pieces) + rest == MONKEY


def byte_fallback_decoder() -> tuple[Tokenizer, dict[str, int]]:
    """A tokenizer whose unknown characters are tokens of one byte, each a replacement character until all are there."""
    vocabulary = {**{f"<0x{byte:02X}>": byte for byte in range(256)}, "\u2581one": 256, "\u2581two": 257, "o": 258}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend, vocabulary


@settings(deadline=None)
@given(st.text(st.sampled_from("\xe9\u4eee\U0001f642"), max_size=20))
def test_characters_of_byte_tokens_come_out_whole(text):
    backend, _ = byte_fallback_decoder()
    ids = [256, *text.encode(), 257]
    pieces, rest = stream(ids, decode=backend.decode)
    assert "".join(pieces) + rest == f"one{text} two"
    # Each character is a piece, which comes with its last byte.
    assert [piece for piece in pieces if piece] == ["one", *text, " two"]


def test_byte_tokens_that_are_no_text_are_not_held_back_for_ever():
    backend, _ = byte_fallback_decoder()
    pieces, rest = stream([256, *b"\xff" * 50, 257, 257], decode=backend.decode)
    assert "".join(pieces) + rest == "one" + REPLACEMENT * 50 + " two two"
    assert "".join(pieces[:40]) == "one" + REPLACEMENT * 36


def test_a_leading_space_that_the_tokenizer_drops_at_the_start_is_kept_inside():
    backend = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "\u2581three": 2}, unk_token="\u2581one"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert stream([0, 1, 2], decode=backend.decode)[0] == ["one", " two", " three"]
    assert stream([1, 2], decode=backend.decode, prompt_ids=[0])[0] == [" two", " three"]


@pytest.mark.parametrize("ids", [[], [0], [0, 0]])
def test_tokens_without_text_give_none(ids):
    pieces, rest = stream(ids)
    assert "".join(pieces) + rest == ""
