"""Which checkpoints are there, which are whole, and how they come and go. Files only, no tensors."""

from pathlib import Path

import pytest

from dsmoe_ray.durable import write_durably
from dsmoe_ray.errors import CheckpointError
from dsmoe_ray.training.checkpoint_commit import (
    WrittenPart,
    commit_checkpoint,
    prepare_checkpoints,
    set_aside_after,
    staging_path,
)
from dsmoe_ray.training.checkpoint_store import (
    checkpoint_path,
    find_newest_complete,
    list_checkpoints,
    read_manifest,
    verify_checkpoint,
)


def make_part(directory: Path, step: int, *, rank: int = 0, world_size: int = 1, text: str = "data") -> WrittenPart:
    folder = staging_path(directory, step) / f"rank-{rank:05d}"
    folder.mkdir(parents=True)
    digest = write_durably(folder / "__0_0.distcp", f"{text} of rank {rank} at {step}".encode())
    values = {"position": step * 10}
    return WrittenPart(rank, {f"{folder.name}/__0_0.distcp": digest}, 5, 5 * world_size, values)


def commit(directory: Path, step: int, *, keep: int = 3, world_size: int = 2, text: str = "data") -> Path:
    parts = [make_part(directory, step, rank=rank, world_size=world_size, text=text) for rank in range(world_size)]
    mesh = {"dp_replicate": 1, "dp_shard": 1, "ep": world_size}
    return commit_checkpoint(directory, step=step, parts=parts, config_digest="abc", mesh=mesh, keep=keep)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def data_file(path: Path) -> Path:
    return path / "rank-00001" / "__0_0.distcp"


def test_a_committed_checkpoint_is_found_with_its_manifest(tmp_path):
    path = commit(tmp_path, 100)
    found = find_newest_complete(tmp_path)
    assert found.path == path == tmp_path / "step-00000100"
    assert found.refused == ()
    assert found.manifest is not None
    assert (found.manifest.step, found.manifest.world_size, found.manifest.config_digest) == (100, 2, "abc")
    assert found.manifest.mesh["ep"] == 2
    assert found.manifest.values == {"position": 1000}
    assert names(tmp_path) == ["step-00000100"]


def test_nothing_is_found_where_nothing_was_saved(tmp_path):
    assert find_newest_complete(tmp_path / "absent").path is None


def test_only_the_newest_are_kept_and_the_oldest_go_after_the_commit(tmp_path):
    for step in (10, 20, 30, 40):
        commit(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]


def test_steps_sort_by_number_beyond_eight_digits(tmp_path):
    commit(tmp_path, 99_999_999)
    commit(tmp_path, 100_000_000)
    assert find_newest_complete(tmp_path).path == checkpoint_path(tmp_path, 100_000_000)


def test_a_second_save_of_a_step_replaces_the_first(tmp_path):
    commit(tmp_path, 10, text="first")
    path = commit(tmp_path, 10, text="second")
    assert data_file(path).read_text().startswith("second")
    assert names(tmp_path) == ["step-00000010"]


def test_parts_of_an_earlier_larger_world_are_dropped_at_commit(tmp_path):
    make_part(tmp_path, 10, rank=7)
    path = commit(tmp_path, 10)
    assert names(path) == ["manifest.json", "rank-00000", "rank-00001"]


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "truncated": (lambda path: data_file(path).write_bytes(data_file(path).read_bytes()[:-1]), "__0_0.distcp"),
    "bit flipped": (lambda path: flip_bit(data_file(path)), "__0_0.distcp"),
    "missing file": (lambda path: data_file(path).unlink(), "__0_0.distcp"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    "manifest bit flipped": (lambda path: flip_bit(path / "manifest.json"), "manifest.json"),
    "manifest truncated": (
        lambda path: (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-20]),
        "manifest.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path, damage):
    older, newer = commit(tmp_path, 10), commit(tmp_path, 20)
    spoil, file_name = DAMAGE[damage]
    spoil(newer)
    found = find_newest_complete(tmp_path)
    assert found.path == older
    assert len(found.refused) == 1
    assert file_name in found.refused[0]
    assert newer.name in found.refused[0]
    with pytest.raises(CheckpointError, match=file_name):
        verify_checkpoint(newer)


def test_an_unknown_format_version_is_told_apart_from_damage(tmp_path):
    path = commit(tmp_path, 10)
    from dsmoe_ray.durable import from_sealed_json, to_sealed_json

    manifest = path / "manifest.json"
    manifest.write_bytes(to_sealed_json({**from_sealed_json(manifest.read_bytes()), "format_version": 2}))
    with pytest.raises(CheckpointError, match="format version 2 is unknown"):
        read_manifest(path)


def test_a_manifest_whose_file_names_lead_outside_is_refused(tmp_path):
    path = commit(tmp_path, 10)
    from dsmoe_ray.durable import from_sealed_json, to_sealed_json

    fields = from_sealed_json((path / "manifest.json").read_bytes())
    fields["files"]["../../etc/passwd"] = {"sha256": "0" * 64, "size_bytes": 1}
    (path / "manifest.json").write_bytes(to_sealed_json(fields))
    with pytest.raises(CheckpointError, match="leads out of the checkpoint"):
        read_manifest(path)


def test_a_commit_without_every_rank_is_refused_and_leaves_nothing(tmp_path):
    part = make_part(tmp_path, 10, rank=1, world_size=2)
    with pytest.raises(CheckpointError, match=r"found ranks \[1\]"):
        commit_checkpoint(tmp_path, step=10, parts=[part], config_digest="", mesh={}, keep=1)
    assert list_checkpoints(tmp_path) == []


def test_a_commit_whose_elements_do_not_add_up_is_refused(tmp_path):
    part = make_part(tmp_path, 10, rank=0, world_size=2)
    with pytest.raises(CheckpointError, match="wrote 5 tensor elements but hold"):
        commit_checkpoint(tmp_path, step=10, parts=[part], config_digest="", mesh={}, keep=1)


def test_a_commit_of_files_that_are_not_here_points_at_the_run_directory(tmp_path):
    part = make_part(tmp_path / "elsewhere", 10)
    staging_path(tmp_path, 10).mkdir()
    with pytest.raises(CheckpointError, match=r"run\.dir"):
        commit_checkpoint(tmp_path, step=10, parts=[part], config_digest="", mesh={}, keep=1)


def test_what_a_killed_process_left_is_cleared_at_start(tmp_path):
    kept = commit(tmp_path, 10)
    make_part(tmp_path, 20)
    kept.rename(tmp_path / ".replaced-step-00000010")
    (tmp_path / ".deleted-step-00000005").mkdir()
    prepare_checkpoints(tmp_path)
    assert names(tmp_path) == ["step-00000010"]
    assert find_newest_complete(tmp_path).path == kept


def test_later_checkpoints_are_set_aside_and_never_chosen_again(tmp_path):
    for step in (10, 20, 30):
        commit(tmp_path, step)
    set_aside_after(tmp_path, 10)
    assert find_newest_complete(tmp_path).path == checkpoint_path(tmp_path, 10)
    assert names(tmp_path) == ["aside-0-step-00000020", "aside-0-step-00000030", "step-00000010"]
    commit(tmp_path, 20)
    set_aside_after(tmp_path, -1)
    assert names(tmp_path)[:2] == ["aside-0-step-00000010", "aside-0-step-00000020"]
    assert "aside-1-step-00000020" in names(tmp_path)
