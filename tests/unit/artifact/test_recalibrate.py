"""A published model gets another deployed routing: all or nothing, and its weights stay the files they are."""

import errno
import os

import pytest
import torch

from dsmoe_ray.artifact import recalibrate
from dsmoe_ray.artifact.calibration_record import CalibrationRecord
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.recalibrate import update_routing
from dsmoe_ray.errors import ArtifactError
from dsmoe_ray.model.config import RoutingConfig
from tests.unit.artifact.conftest import TOKENIZER

TABLE = RoutingConfig(mode="per_layer_top_k", per_layer_top_k=(5, 2))
RECORD = CalibrationRecord.model_validate(
    {
        "budget": 0.3,
        "method": "auto",
        "routing": TABLE.to_spec(),
        "deployed_before": "top_k=3",
        "data": "text",
        "data_sha256": "0" * 64,
        "seq_len": 4,
        "num_selection_tokens": 40,
        "num_held_out_tokens": 36,
        "created_unix_s": 1.5,
        "duration_s": 2.0,
        "frontier": [
            {
                "routing": TABLE.to_spec(),
                "active_ffn_ratio": 7 / 24,
                "loss": 1.25,
                "selection_active_ffn_ratio": 7 / 24,
                "selection_loss": 1,
            }
        ],
        "profile": {"top_k": [1, 6], "loss_increase": [[0.5, -0.01], [0.25, 0.0]]},
    }
)


def inodes(directory):
    return {path.name: path.stat().st_ino for path in directory.glob("*.safetensors")}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def sharded(publish):
    return publish(max_file_bytes=4000)


def test_routing_and_calibration_come_back_and_everything_else_stays(sharded, config, tensors):
    before = load_artifact(sharded)
    update_routing(before, ffn=TABLE, calibration=RECORD)
    after = load_artifact(sharded)
    assert after.model_config.ffn.router.inference == TABLE
    assert after.model_config.with_ffn_routing(config.ffn.router.inference) == config
    assert after.manifest.calibration == RECORD
    assert after.manifest.routing["ffn"]["inference"]["per_layer_top_k"] == [5, 2]
    for kept in ("provenance", "tensors", "weight_files"):
        assert getattr(after.manifest, kept) == getattr(before.manifest, kept)
    for name, tensor in after.load_state_dict().items():
        assert torch.equal(tensor, tensors[name])


def test_weights_are_not_written_again(sharded):
    before = inodes(sharded)
    update_routing(load_artifact(sharded), ffn=TABLE, calibration=RECORD)
    assert inodes(sharded) == before and len(before) > 1
    assert names(sharded.parent) == [sharded.name]


def test_another_directory_leaves_the_artifact_as_it_was(sharded, tmp_path):
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    target = update_routing(load_artifact(sharded), ffn=TABLE, calibration=None, target=tmp_path / "new" / "place")
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before
    assert load_artifact(target).model_config.ffn.router.inference == TABLE
    assert inodes(target) == inodes(sharded)


def test_where_files_cannot_be_linked_they_are_copied(sharded, tmp_path, monkeypatch, tensors):
    def refuse(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(recalibrate.os, "link", refuse)
    target = update_routing(load_artifact(sharded), ffn=TABLE, calibration=RECORD, target=tmp_path / "copy")
    assert not set(inodes(target).values()) & set(inodes(sharded).values())
    assert load_artifact(target).load_state_dict().keys() == tensors.keys()


def test_a_later_routing_without_calibration_forgets_the_earlier_one(sharded):
    update_routing(load_artifact(sharded), ffn=TABLE, calibration=RECORD)
    update_routing(load_artifact(sharded), ffn=RoutingConfig(), calibration=None)
    assert load_artifact(sharded).manifest.calibration is None
    assert b"calibration" not in (sharded / "manifest.json").read_bytes()


def test_every_side_file_stays(publish):
    directory = publish(chat_template="{{ messages }}", generation_config={"temperature": 0.5})
    update_routing(load_artifact(directory), ffn=TABLE, calibration=RECORD)
    after = load_artifact(directory)
    assert (directory / "chat_template.jinja").read_text() == "{{ messages }}"
    assert after.generation_config["temperature"] == 0.5 and after.tokenizer_json == TOKENIZER


def test_files_that_someone_put_beside_the_weights_stay(sharded):
    (sharded / "README.md").write_text("about")
    (sharded / "plots").mkdir()
    (sharded / "plots" / "config.json").write_text("{}")
    update_routing(load_artifact(sharded), ffn=TABLE, calibration=RECORD)
    assert (sharded / "README.md").read_text() == "about"
    assert (sharded / "plots" / "config.json").read_text() == "{}"


def test_links_are_followed_and_never_linked(sharded, tmp_path):
    """A directory of links, as download caches make them, becomes one of files; a link to an artifact stays a link."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in sharded.iterdir():
        (cache / path.name).symlink_to(path)
    update_routing(load_artifact(cache), ffn=TABLE, calibration=RECORD)
    assert not any(path.is_symlink() for path in cache.iterdir())
    link = tmp_path / "latest"
    link.symlink_to(sharded)
    update_routing(load_artifact(link), ffn=TABLE, calibration=RECORD)
    assert link.is_symlink() and load_artifact(sharded).manifest.calibration == RECORD


def test_a_failure_in_mid_way_changes_nothing(sharded, monkeypatch):
    before = {path.name: path.read_bytes() for path in sharded.iterdir()}
    artifact = load_artifact(sharded)

    def fail(staging, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(recalibrate, "commit_directory", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        update_routing(artifact, ffn=TABLE, calibration=RECORD)
    assert {path.name: path.read_bytes() for path in sharded.iterdir()} == before
    assert names(sharded.parent) == [sharded.name]


def test_whoever_has_the_old_artifact_open_keeps_it(sharded, tensors):
    opened = load_artifact(sharded)
    view = opened.load_parameter("norm.weight")
    update_routing(load_artifact(sharded), ffn=TABLE, calibration=RECORD)
    assert torch.equal(view, tensors["norm.weight"])
    assert torch.equal(opened.load_parameter("embedding.weight"), tensors["embedding.weight"])


def test_an_impossible_rule_is_refused_before_anything_is_written(sharded):
    rule = RoutingConfig(mode="per_layer_top_k", per_layer_top_k=(5, 2, 1))
    with pytest.raises(ValueError, match="got 3, num_layers=2"):
        update_routing(load_artifact(sharded), ffn=rule, calibration=None)
    assert names(sharded.parent) == [sharded.name]
