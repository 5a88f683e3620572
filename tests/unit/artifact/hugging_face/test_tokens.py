"""What comes in beside the weights: defaults for generation and the chat template."""

import pytest

from dsmoe_ray.artifact.hugging_face.formats import Format
from dsmoe_ray.artifact.hugging_face.import_model import open_model
from dsmoe_ray.artifact.hugging_face.tokens import read_chat_template, read_generation_config
from dsmoe_ray.errors import ArtifactError


def test_defaults_for_generation_come_as_they_are_but_for_the_librarys_own(tmp_path, edit_json):
    path = tmp_path / "generation_config.json"
    edit_json(path, temperature=0.7, eos_token_id=[1, 2], _from_model_config=True, transformers_version="5")
    config = {"bos_token_id": 3, "eos_token_id": 4}
    found = read_generation_config(tmp_path, config, vocab_size=10)
    assert found == {"temperature": 0.7, "eos_token_id": [1, 2], "bos_token_id": 3}


def test_without_defaults_the_tokens_of_the_config_are_taken(tmp_path):
    config = {"eos_token_id": 4, "bos_token_id": None, "pad_token_id": -1}
    assert read_generation_config(tmp_path, config, vocab_size=10) == {"eos_token_id": 4}


@pytest.mark.parametrize("token", [10, -2, 1.5, True, [], [3, "x"], {}])
def test_a_token_that_the_model_does_not_have_is_refused(tmp_path, token):
    with pytest.raises(ArtifactError, match="is no token id below vocab_size=10"):
        read_generation_config(tmp_path, {"eos_token_id": token}, vocab_size=10)


@pytest.mark.parametrize(
    ("found", "template"),
    [
        ("{{ x }}", "{{ x }}"),
        ([{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tools", "template": "t"}], None),
        ([3], None),
        (None, None),
    ],
)
def test_an_older_chat_template_stands_in_the_tokenizers_config(tmp_path, edit_json, found, template):
    edit_json(tmp_path / "tokenizer_config.json", chat_template=found)
    assert read_chat_template(tmp_path) == template
    (tmp_path / "chat_template.jinja").write_text("the file goes first")
    assert read_chat_template(tmp_path) == "the file goes first"


@pytest.mark.parametrize("found", [3, {"default": "x"}, "\ud800"])
def test_a_chat_template_that_is_no_text_is_refused(tmp_path, edit_json, found):
    edit_json(tmp_path / "tokenizer_config.json", chat_template=found)
    with pytest.raises(ArtifactError, match="chat_template must be text"):
        read_chat_template(tmp_path)


def test_a_file_that_is_no_utf8_is_refused(make_stock):
    directory = make_stock(Format.MIXTRAL)
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja is not UTF-8"):
        open_model(directory)
