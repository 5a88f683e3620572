"""Directories are replaced whole; sealed JSON tells on itself."""

import json
from pathlib import Path

import pytest

from dsmoe_ray.durable import (
    commit_directory,
    digest_file,
    from_sealed_json,
    recover_directory,
    to_sealed_json,
    write_durably,
)


def make_directory(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_committed_directory_takes_the_place_of_an_older_one(tmp_path):
    target = make_directory(tmp_path / "target", "old")
    commit_directory(make_directory(tmp_path / ".staging", "new"), target)
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_replacement_cut_short_between_its_renames_gives_the_old_directory_back(tmp_path):
    make_directory(tmp_path / ".replaced-target", "old")
    recover_directory(tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "old"


def test_a_replacement_cut_short_after_its_renames_keeps_the_new_directory(tmp_path):
    make_directory(tmp_path / ".replaced-target", "old")
    make_directory(tmp_path / "target", "new")
    recover_directory(tmp_path / "target")
    assert (tmp_path / "target" / "file").read_text() == "new"
    assert not (tmp_path / ".replaced-target").exists()


def test_a_durable_file_is_digested_and_never_overwritten(tmp_path):
    digest = write_durably(tmp_path / "file", b"abc")
    assert digest == digest_file(tmp_path / "file")
    assert digest.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "file", b"def")


def test_sealed_json_gives_back_what_it_was_given():
    fields = {"number": 0.1, "text": "\u00e9", "list": [1, None, True], "inner": {"b": 1, "a": 2}}
    assert from_sealed_json(to_sealed_json(fields)) == fields


def test_sealed_json_refuses_every_single_bit_flip_that_changes_a_value():
    data = to_sealed_json({"step": 100, "name": "run"})
    fields = json.loads(data)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            try:
                found = from_sealed_json(bytes(flipped))
            except ValueError:
                continue
            # Only white space can change unnoticed.
            assert {**found, "manifest_sha256": fields["manifest_sha256"]} == fields


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"{}", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_not_sealed_json_is_a_value_error(data):
    with pytest.raises(ValueError, match="it "):
        from_sealed_json(data)
