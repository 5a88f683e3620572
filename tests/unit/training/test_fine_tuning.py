"""What a run takes over from the model it starts from."""

import pytest

from dsmoe_ray.data.tokenizer import train_tokenizer
from dsmoe_ray.errors import ArtifactError, ConfigError, DataError
from dsmoe_ray.training.fine_tuning import adopt_tokenizer
from tests.fakes.tiny_artifact import write_tiny_artifact


@pytest.fixture
def artifact(tmp_path):
    return write_tiny_artifact(tmp_path / "artifact")


def test_a_run_from_the_first_weights_stays_as_it_is(tiny_config):
    assert adopt_tokenizer(tiny_config()) == tiny_config()


def test_a_run_from_an_artifact_reads_its_data_with_the_artifacts_tokenizer(tiny_config, artifact):
    config = adopt_tokenizer(tiny_config(f"model.init_from={artifact}"))
    assert config.data.tokenizer == str(artifact / "tokenizer.json")


def test_the_same_tokenizer_in_another_place_is_taken(tiny_config, artifact, tmp_path):
    copy = tmp_path / "copy.json"
    copy.write_text((artifact / "tokenizer.json").read_text())
    config = adopt_tokenizer(tiny_config(f"model.init_from={artifact}", f"data.tokenizer={copy}"))
    assert config.data.tokenizer == str(artifact / "tokenizer.json")


def test_another_tokenizer_is_refused(tiny_config, artifact, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(train_tokenizer(["another text, so other tokens"] * 4, vocab_size=300).to_json())
    with pytest.raises(ConfigError, match=r"is not the tokenizer of model\.init_from"):
        adopt_tokenizer(tiny_config(f"model.init_from={artifact}", f"data.tokenizer={other}"))


def test_a_smaller_vocabulary_than_the_artifacts_is_refused(tiny_config, artifact):
    with pytest.raises(DataError, match=r"Set model\.vocab_size to at least 300"):
        adopt_tokenizer(tiny_config(f"model.init_from={artifact}", "model.vocab_size=299"))


def test_a_changed_tokenizer_is_refused_by_its_digest(tiny_config, artifact):
    path = artifact / "tokenizer.json"
    path.write_text(path.read_text().replace("endoftext", "endoftexx"))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json does not match its SHA-256"):
        adopt_tokenizer(tiny_config(f"model.init_from={artifact}"))
