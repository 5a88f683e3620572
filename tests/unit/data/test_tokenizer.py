"""Training, loading and using tokenizers."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dsmoe_ray.data import tokenizer as tokenizer_module
from dsmoe_ray.data.tokenizer import TextTokenizer, load_tokenizer, parse_tokenizer, train_tokenizer
from dsmoe_ray.errors import DataError

TEXTS = [f"def function_{number}(argument):\n    return argument + {number}\n" for number in range(100)]


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.mark.parametrize("vocab_size", [257, 300, 5000], ids=["bytes only", "some merges", "more than the text has"])
def test_a_trained_vocabulary_has_exactly_the_size_asked_for_and_end_of_text_is_zero(vocab_size):
    trained = train_tokenizer(TEXTS, vocab_size=vocab_size)
    assert trained.vocab_size == trained.backend.get_vocab_size() == vocab_size
    assert trained.end_of_text_id == trained.backend.token_to_id("<|endoftext|>") == 0
    assert trained.decode(trained.encode(TEXTS[7]).tolist()) == TEXTS[7]


def test_training_on_the_same_texts_gives_the_same_tokenizer(trained):
    assert train_tokenizer(iter(TEXTS), vocab_size=320).to_json() == trained.to_json()


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(DataError, match=r"model.vocab_size=256 is too small.*at least 257"):
        train_tokenizer(TEXTS, vocab_size=256)


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_any_text_survives_encoding_and_decoding(trained, text):
    assert trained.decode(trained.encode(text).tolist()) == text


def test_a_text_that_spells_a_special_token_does_not_end_its_document():
    trained = train_tokenizer(TEXTS, vocab_size=5000)
    text = "a <|endoftext|> b <|reserved_0|>"
    ids = trained.encode(text)
    assert 0 not in ids
    assert ids.max() < trained.backend.token_to_id("<|reserved_0|>")
    assert trained.decode(ids.tolist()) == text


def test_a_saved_tokenizer_loads_to_one_that_encodes_the_same(trained, tmp_path):
    (tmp_path / "tokenizer.json").write_text(trained.to_json())
    loaded = load_tokenizer(tmp_path / "tokenizer.json", vocab_size=320)
    assert loaded.digest == trained.digest
    np.testing.assert_array_equal(loaded.encode("return <|endoftext|>"), trained.encode("return <|endoftext|>"))


def test_the_digest_tells_vocabularies_apart_but_not_their_spelling(trained):
    respelled = parse_tokenizer(json.dumps(json.loads(trained.to_json())), source="test")
    assert respelled.digest == trained.digest
    assert train_tokenizer(TEXTS, vocab_size=319).digest != trained.digest


def test_a_long_text_is_encoded_in_pieces_to_the_same_tokens(trained, monkeypatch):
    texts = ["\n\n".join(TEXTS) + "\n  indented \t and\n\n\nend", "it's\nline\nafter\nline\n" * 30, "x" * 200]
    whole = trained.encode_batch(texts)
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 10)
    for in_pieces, in_one in zip(trained.encode_batch(texts), whole, strict=True):
        np.testing.assert_array_equal(in_pieces, in_one)
    assert [len(list(tokenizer_module._split(text))) > 20 for text in texts] == [True, True, False]


def test_truncation_and_padding_in_the_file_do_not_touch_documents(trained):
    backend = Tokenizer.from_str(trained.to_json())
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    loaded = parse_tokenizer(backend.to_str(), source="test")
    np.testing.assert_array_equal(loaded.encode(TEXTS[0]), trained.encode(TEXTS[0]))


@pytest.mark.parametrize("content", [b"not json", b"{}", b'{"model": {"type": "Nonsense"}}', b"\xff\xfe"])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer.json"):
        load_tokenizer(path)


def test_a_missing_tokenizer_file_is_told_by_name(tmp_path):
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*absent.json"):
        load_tokenizer(tmp_path / "absent.json")


def test_a_tokenizer_with_ids_the_model_has_not_is_refused_with_both_numbers(trained):
    with pytest.raises(DataError, match=r"ids up to 319, but model.vocab_size=319 .* to at least 320"):
        parse_tokenizer(trained.to_json(), source="test", vocab_size=319)


def test_ids_with_gaps_count_by_the_largest():
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 900}, unk_token="a"))
    with pytest.raises(DataError, match="ids up to 900"):
        parse_tokenizer(backend.to_str(), source="test", vocab_size=500)
    assert parse_tokenizer(backend.to_str(), source="test", vocab_size=901).end_of_text_id == 900


def test_tokens_that_end_a_text_may_be_named_by_the_model():
    backend = Tokenizer(models.WordLevel({"a": 0, "<|im_end|>": 1, "</s>": 2}, unk_token="a"))
    named = parse_tokenizer(backend.to_str(), source="test", end_ids=[1, 2])
    assert (named.end_of_text_id, named.end_ids) == (1, (1, 2))
    assert parse_tokenizer(backend.to_str(), source="test").end_ids == (2,)


def test_a_tokenizer_without_an_end_of_text_is_refused():
    with pytest.raises(DataError, match=r"no token that ends a text; it needs one of <\|endoftext\|>"):
        parse_tokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str(), source="test")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 339), max_size=12))
def test_tokens_are_decoded_as_the_library_decodes_them(ids):
    decoded = _with_added_tokens()
    # Ids from 324 on are no tokens: a model may have more rows than its tokenizer has tokens.
    assert decoded.decode(ids) == decoded.backend.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 339), max_size=12))
def test_the_bytes_of_tokens_add_up_to_the_text(ids):
    decoded = _with_added_tokens()
    assert b"".join(map(decoded.bytes_of, ids)).decode(errors="replace") == decoded.decode(ids)


def test_bytes_of_tokens_are_known_whatever_the_vocabulary_is_made_of():
    vocabulary = {**{f"<0x{byte:02X}>": byte for byte in range(256)}, "\u2581one": 256, "a": 257, "</s>": 258}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    tokenizer = TextTokenizer(backend, end_of_text_id=258)
    ids = [256, 0xE6, 0xBC, 0xA2, 257, 258, 999]
    assert [tokenizer.bytes_of(token) for token in ids] == [b" one", b"\xe6", b"\xbc", b"\xa2", b"a", b"", b""]


def test_the_longest_token_bounds_how_few_tokens_a_text_has(trained):
    longest = trained.longest_token_bytes
    assert longest == max(len(trained.bytes_of(token)) for token in range(trained.vocab_size))
    assert all(len(trained.encode(text)) * longest >= len(text.encode()) for text in TEXTS)


def test_names_of_special_tokens_are_those_tokens_only_in_a_text_that_is_trusted():
    decoded = _with_added_tokens()
    text = "def <|user|> f"
    user = decoded.special_ids["<|user|>"]
    assert user not in decoded.encode(text)
    trusted = decoded.encode_with_special(text)
    assert trusted == [*decoded.encode("def "), user, *decoded.encode(" f")]
    # The setting of the one has not become that of the other.
    assert user not in decoded.encode(text)


@functools.cache
def _with_added_tokens() -> TextTokenizer:
    backend = train_tokenizer([*TEXTS, "na\xefve \u6f22\u5b57 \U0001f600"], vocab_size=320).backend
    backend.add_tokens(["plain text \u6f22", "<tag>"])
    backend.add_special_tokens(["<|user|>", "<|model|>"])
    return TextTokenizer(backend, end_of_text_id=0)
