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


@settings(deadline=None)
@given(st.text())
def test_pieces_of_any_text_add_up_to_it_and_none_ends_in_half_a_character(text):
    pieces, rest = stream(tokenizer().encode(text))
    assert "".join(pieces) + rest == text
    # A replacement character that the text itself holds may only come late.
    assert rest.strip(REPLACEMENT) == "" and all(not piece.endswith(REPLACEMENT) for piece in pieces)


@settings(deadline=None)
@given(st.lists(st.integers(0, 299)), st.lists(st.integers(0, 299), max_size=8))
def test_pieces_of_any_tokens_add_up_to_what_they_mean_together(ids, prompt_ids):
    """A model may emit bytes that are no text at all."""
    # A prompt is text, so it ends with a whole character.
    prompt_ids = list(tokenizer().encode(tokenizer().decode(prompt_ids)))
    pieces, rest = stream(ids, prompt_ids=prompt_ids)
    prompt = tokenizer().decode(prompt_ids)
    assert prompt + "".join(pieces) + rest == tokenizer().decode([*prompt_ids, *ids])


@settings(deadline=None)
@given(st.text())
def test_a_piece_is_out_as_soon_as_its_characters_are(text):
    ids = list(tokenizer().encode(text))
    detokenizer, given_out = StreamingDetokenizer(tokenizer().decode), ""
    for count, token in enumerate(ids, start=1):
        given_out += detokenizer.push(token)
        so_far = tokenizer().decode(ids[:count])
        if not so_far.endswith(REPLACEMENT):
            assert given_out == so_far


def test_a_leading_space_that_the_tokenizer_drops_at_the_start_is_kept_inside():
    backend = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "\u2581three": 2}, unk_token="\u2581one"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert stream([0, 1, 2], decode=backend.decode)[0] == ["one", " two", " three"]
    assert stream([1, 2], decode=backend.decode, prompt_ids=[0])[0] == [" two", " three"]


@pytest.mark.parametrize("ids", [[], [0], [0, 0]])
def test_tokens_without_text_give_none(ids):
    pieces, rest = stream(ids)
    assert "".join(pieces) + rest == ""
