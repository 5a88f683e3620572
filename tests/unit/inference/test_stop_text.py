"""Stop strings: found wherever the text is cut, never leaked, nothing held back without need."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.inference.stop_text import StopTextFinder

# Few letters, so that stop strings overlap themselves and each other.
TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)
PIECES = st.lists(st.text("abc", max_size=6), max_size=10)


def feed(pieces, stop, *, include=False):
    """Return the text given out until a stop string or the end, and the finder."""
    finder = StopTextFinder(stop, include_stop_in_output=include)
    given_out = ""
    for piece in pieces:
        given_out += finder.push(piece)
        if finder.found is not None:
            return given_out, finder
    return given_out + finder.flush(), finder


def define_end(text, stop):
    """Look at the text letter by letter: return (start, end, stop string) of what ends it, or None."""
    for end in range(1, len(text) + 1):
        complete = [found for found in stop if text[:end].endswith(found)]
        if complete:
            longest = max(complete, key=len)
            return end - len(longest), end, longest
    return None


@settings(deadline=None)
@given(PIECES, STOPS, st.booleans())
def test_the_text_ends_at_the_first_complete_stop_string_however_it_is_cut(pieces, stop, include):
    text = "".join(pieces)
    expected = define_end(text, stop)
    given_out, finder = feed(pieces, stop, include=include)
    if expected is None:
        assert (given_out, finder.found) == (text, None)
    else:
        start, end, found = expected
        assert (given_out, finder.found) == (text[: end if include else start], found)


@settings(deadline=None)
@given(TEXTS, STOPS)
def test_as_little_is_held_back_as_can_be(text, stop):
    """What is held is the longest end of the text that begins a stop string, after every letter."""
    finder, given_out = StopTextFinder(stop), ""
    for count, letter in enumerate(text, start=1):
        given_out += finder.push(letter)
        if finder.found is not None:
            return
        so_far = text[:count]
        held = max(
            (length for found in stop for length in range(len(found)) if so_far.endswith(found[:length])), default=0
        )
        assert given_out == so_far[: count - held]


@pytest.mark.parametrize(
    ("pieces", "stop", "given_out", "found"),
    [
        (["Hello wor", "ld"], ["world"], "Hello ", "world"),
        (["abcab", "cabd"], ["abcabd"], "abc", "abcabd"),
        (["xabcd"], ["bc", "abcd"], "xa", "bc"),
        (["xab"], ["b", "ab"], "x", "ab"),
        (["\n", "\n"], ["\n\n"], "", "\n\n"),
        (["a\U0001f642", "b"], ["\U0001f642b"], "a", "\U0001f642b"),
    ],
    ids=["across pieces", "overlapping itself", "first complete", "first to start", "line ends", "beyond ASCII"],
)
def test_examples(pieces, stop, given_out, found):
    text, finder = feed(pieces, stop)
    assert (text, finder.found) == (given_out, found)


def test_what_could_have_been_a_stop_string_comes_out_at_the_end():
    finder = StopTextFinder(["end of text"])
    assert finder.push("the end of") == "the "
    assert finder.flush() == "end of" and finder.flush() == "" and finder.found is None


def test_without_stop_strings_text_passes_through():
    assert feed(["ab", "", "c"], [])[0] == "abc"


def test_nothing_can_follow_a_stop_string():
    finder = StopTextFinder(["b"])
    assert finder.push("abc") == "a" and finder.flush() == ""
    with pytest.raises(ValueError, match="ended with 'b'"):
        finder.push("d")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty stop string"):
        StopTextFinder(["a", ""])
