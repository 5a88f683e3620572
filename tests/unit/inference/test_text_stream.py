"""Tokens to text with stop strings, also when the sequence goes on elsewhere."""

import functools

from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.data.tokenizer import TextTokenizer, train_tokenizer
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.text_stream import TextStream

TEXT = "the cat sat on the mat, the dog \U0001f642 on the cat. "


@functools.cache
def tokenizer() -> TextTokenizer:
    return train_tokenizer([TEXT * 4], vocab_size=280)


def stream(request, ids):
    """Return the pieces up to a stop string or the end, and the stop string."""
    text, pieces = TextStream(tokenizer().decode, request), []
    for token_id in ids:
        if text.found_stop is not None:
            break
        pieces.append(text.push(token_id))
    return [*pieces, text.finish()], text.found_stop


def make_request(**fields):
    prompt_ids = tokenizer().encode("see: ")
    return GenerationRequest(**{"prompt_ids": prompt_ids, "max_tokens": 1000, **fields})


def test_a_stop_string_across_tokens_and_inside_one_does_not_show():
    ids = [int(token) for token in tokenizer().encode(TEXT)]
    for stop, expected in (
        (["dog"], "the cat sat on the mat, the "),
        (["t sa"], "the ca"),
        ([" \U0001f642"], "the cat sat on the mat, the dog"),
        (["no such", "mat,", "e mat"], "the cat sat on th"),
    ):
        pieces, found = stream(make_request(stop=stop), ids)
        assert "".join(pieces) == expected and found in stop
        pieces, found = stream(make_request(stop=stop, include_stop_in_output=True), ids)
        assert "".join(pieces) == expected + found


def test_a_stop_string_that_the_last_half_character_completes_ends_the_text():
    pieces, found = stream(make_request(stop=["\N{REPLACEMENT CHARACTER}"]), tokenizer().encode("a\xe9")[:-1])
    assert ("".join(pieces), found) == ("a", "\N{REPLACEMENT CHARACTER}")


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 279), min_size=1, max_size=30),
    st.lists(st.text("atche \U0001f642", min_size=1, max_size=4), max_size=3),
    st.integers(0, 30),
)
def test_a_sequence_that_goes_on_elsewhere_has_the_rest_of_the_text(ids, stop, num_before):
    request = make_request(stop=stop)
    pieces, found = stream(request, ids)
    ids_before = ids[: min(num_before, len(pieces) - 2)]
    rest, found_elsewhere = stream(request.continue_sequence(0, ids_before), ids[len(ids_before) :])
    assert rest == pieces[len(ids_before) :] and found_elsewhere == found
