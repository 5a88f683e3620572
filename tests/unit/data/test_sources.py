"""Which files make a corpus, and which of their documents are held out."""

import os
import sysconfig
from pathlib import Path

import pytest

from dsmoe_ray.config_io import parse_config
from dsmoe_ray.data.config import DataConfig
from dsmoe_ray.data.sources import (
    choose_held_out_ratio,
    digest_listing,
    expand_path,
    hash_unit,
    is_held_out,
    list_sources,
)
from dsmoe_ray.errors import ConfigError, DataError


def make_tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_a_directory_gives_its_matching_files_by_name_without_excluded_and_hidden_ones(tmp_path):
    make_tree(tmp_path, "b.py", "a.py", "notes.md", "sub/c.py", "skip/d.py", "sub/skip/e.py", ".git/f.py", ".g.py")
    sources = list_sources([str(tmp_path)], include="*.py", exclude=["skip"])
    assert [source.name for source in sources] == ["a.py", "b.py", "sub/c.py"]
    assert [source.size_bytes for source in sources] == [4, 4, 8]


def test_paths_keep_the_order_they_were_given_in_and_a_file_needs_no_match(tmp_path):
    make_tree(tmp_path, "z/1.txt", "a/2.txt", "single.log")
    paths = [str(tmp_path / "z"), str(tmp_path / "single.log"), str(tmp_path / "a")]
    assert [source.name for source in list_sources(paths, include="*.txt")] == ["1.txt", "single.log", "2.txt"]


def test_a_file_reached_by_two_paths_or_a_link_is_listed_once(tmp_path):
    make_tree(tmp_path, "sub/a.txt")
    (tmp_path / "link.txt").symlink_to(tmp_path / "sub/a.txt")
    assert len(list_sources([str(tmp_path), str(tmp_path / "sub")])) == 1


def test_the_standard_library_stands_behind_its_placeholder():
    assert expand_path("{stdlib}/json") == Path(sysconfig.get_path("stdlib")).absolute() / "json"
    assert "decoder.py" in [source.name for source in list_sources(["{stdlib}/json"], include="*.py")]


def test_a_pipe_among_the_files_is_not_opened_and_a_dangling_link_is_listed_to_be_reported(tmp_path):
    make_tree(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert [source.name for source in list_sources([str(tmp_path)])] == ["a.txt", "gone.txt"]


def test_a_missing_path_and_a_directory_without_a_match_are_told_by_name(tmp_path):
    with pytest.raises(DataError, match=r"data.paths holds '.*absent'.*Correct the path"):
        list_sources([str(tmp_path / "absent")])
    make_tree(tmp_path, "a.txt")
    with pytest.raises(DataError, match=r"matches data.include='\*.py'"):
        list_sources([str(tmp_path)], include="*.py")


def test_the_listing_digest_changes_when_a_file_grows_is_touched_comes_or_goes(tmp_path):
    make_tree(tmp_path, "a.txt", "b.txt")
    digests = [digest_listing(list_sources([str(tmp_path)]))]

    def remember() -> None:
        digests.append(digest_listing(list_sources([str(tmp_path)])))

    remember()
    assert digests[0] == digests[1]
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    remember()
    (tmp_path / "a.txt").write_text("longer than before")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    remember()
    make_tree(tmp_path, "c.txt")
    remember()
    (tmp_path / "b.txt").unlink()
    remember()
    assert len(set(digests)) == 5


def test_the_held_out_hash_never_changes():
    # A changed hash would move documents from training to evaluation when a run is resumed with a newer version.
    assert hash_unit(b"json/decoder.py") == pytest.approx(0.8702562152395213, abs=1e-12)


def test_the_held_out_share_is_the_ratio_and_a_larger_ratio_keeps_what_a_smaller_one_held_out():
    names = [f"file {number}".encode() for number in range(20_000)]
    small = {name for name in names if is_held_out(name, 0.02)}
    large = {name for name in names if is_held_out(name, 0.1)}
    # Four standard deviations of a binomial: sqrt(20000 * 0.02 * 0.98) = 20.
    assert abs(len(small) - 400) < 80
    assert small < large


def test_of_a_few_files_one_is_held_out_and_never_all(tmp_path):
    make_tree(tmp_path, *[f"{number}.txt" for number in range(5)])
    config = DataConfig(paths=[str(tmp_path)], held_out_ratio=1e-6)
    sources = list_sources(config.paths)
    ratio = choose_held_out_ratio(sources, config=config)
    assert sum(is_held_out(source.identity, ratio) for source in sources) == 1
    assert choose_held_out_ratio(sources[:1], config=config) == 1e-6


@pytest.mark.parametrize("values", [{"include": "src/*.py"}, {"exclude": ["a/b"]}, {"include": ""}])
def test_a_pattern_that_could_match_no_name_is_refused(values):
    with pytest.raises(ConfigError, match="without '/'"):
        parse_config({"paths": ["x"], **values}, DataConfig, source="test")
