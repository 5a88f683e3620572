"""Who may write to a run directory, and who sees it."""

import pytest

from dsmoe_ray.config_io import load_config
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.run_directory import check_probe, open_run_directory, read_probe


@pytest.fixture
def directory(tiny_config):
    return open_run_directory(tiny_config())


def test_the_resolved_config_reads_back_as_it_was(directory, tiny_config):
    config = tiny_config("train.lr=0.5")
    directory.write_config(config)
    assert load_config(directory.config, TrainingRunConfig) == config


def test_a_second_run_in_the_same_directory_is_refused_while_the_first_goes_on(directory):
    with directory.lock(), pytest.raises(ConfigError, match="in use by another run"), directory.lock():
        pass
    with directory.lock():
        pass


def test_a_shard_that_reads_the_token_sees_the_directory(directory):
    with directory.probe() as probe:
        seen = read_probe(probe.path)
        check_probe(probe, {0: seen, 1: seen}, {0: "a", 1: "b"})
    assert read_probe(probe.path) is None


@pytest.mark.parametrize("seen", [None, "another token"], ids=["nothing", "another directory"])
def test_a_shard_that_does_not_is_named(directory, seen):
    with directory.probe() as probe, pytest.raises(ConfigError, match="rank 1 on node-b cannot see"):
        check_probe(probe, {0: probe.token, 1: seen}, {0: "node-a", 1: "node-b"})


def test_a_directory_that_cannot_be_made_is_refused(tiny_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir: .* cannot be written"):
        open_run_directory(tiny_config(f"run.dir={tmp_path / 'file' / 'run'}"))


def test_the_home_of_an_unknown_user_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="home of an unknown user"):
        open_run_directory(tiny_config("run.dir=~nobody-of-this-name/run"))


def test_a_directory_that_goes_with_the_job_is_refused(tiny_config, tmp_path):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1" / "runs" / "quickstart"
    with pytest.raises(ConfigError, match="lies in the copy of the working directory"):
        open_run_directory(tiny_config(f"run.dir={copy}"))
    assert not copy.exists()


def test_no_model_has_been_published_in_a_new_directory(directory):
    assert not directory.has_artifact_of(4)
