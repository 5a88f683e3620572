"""Where a run starts, and what becomes of what an earlier run left."""

import pytest

from dsmoe_ray.durable import write_durably
from dsmoe_ray.errors import CheckpointError, ConfigError
from dsmoe_ray.training.checkpoint_commit import WrittenPart, commit_checkpoint, staging_path
from dsmoe_ray.training.metrics_log import MetricsLog, read_rows
from dsmoe_ray.training.resume import ResumePlan, apply_resume, plan_resume
from dsmoe_ray.training.run_directory import RunDirectory
from tests.fakes.fake_shards import make_metrics


def make_checkpoint(directory, step):
    folder = staging_path(directory, step) / "rank-00000"
    folder.mkdir(parents=True)
    digest = write_durably(folder / "data", f"{step}".encode())
    part = WrittenPart(0, {"rank-00000/data": digest}, 1, 1, {})
    return commit_checkpoint(directory, step=step, parts=[part], config_digest="", mesh={}, keep=9)


def make_run(root, config, *, steps, checkpoints):
    root.mkdir()
    directory = RunDirectory(root)
    directory.write_config(config)
    directory.checkpoints.mkdir()
    MetricsLog(directory.metrics).append([make_metrics(step) for step in range(1, steps + 1)])
    for step in checkpoints:
        make_checkpoint(directory.checkpoints, step)
    return directory


@pytest.fixture
def config(tiny_config):
    return tiny_config()


@pytest.fixture
def directory(tmp_path, config):
    """A run that was killed after step 9."""
    return make_run(tmp_path / "run", config, steps=9, checkpoints=[4, 8])


def names(directory):
    return sorted(path.name for path in directory.checkpoints.iterdir())


def num_rows(directory):
    return len(read_rows(directory.metrics))


def test_a_new_run_starts_from_the_first_weights(tmp_path, config):
    (tmp_path / "new").mkdir()
    directory = RunDirectory(tmp_path / "new")
    plan = plan_resume(directory, config, "auto")
    assert plan == ResumePlan(None, 0)
    apply_resume(directory, plan)
    assert num_rows(directory) == 0


def test_auto_goes_on_from_the_newest_checkpoint(directory, config):
    plan = plan_resume(directory, config, "auto")
    assert (plan.checkpoint.name, plan.step) == ("step-00000008", 8)
    apply_resume(directory, plan)
    assert num_rows(directory) == 8


def test_auto_passes_over_a_damaged_checkpoint_and_says_so(directory, config):
    (directory.checkpoints / "step-00000008" / "rank-00000" / "data").write_text("x")
    plan = plan_resume(directory, config, "auto")
    assert plan.step == 4 and "step-00000008" in plan.notes[0]
    apply_resume(directory, plan)
    assert names(directory) == ["aside-0-step-00000008", "step-00000004"]
    assert num_rows(directory) == 4


def test_auto_refuses_to_start_over_when_all_checkpoints_are_damaged(directory, config):
    for path in directory.checkpoints.glob("*/rank-00000/data"):
        path.write_text("x")
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        plan_resume(directory, config, "auto")


def test_auto_starts_over_a_run_that_was_killed_before_its_first_checkpoint(tmp_path, config):
    directory = make_run(tmp_path / "young", config, steps=3, checkpoints=[])
    apply_resume(directory, plan_resume(directory, config, "auto"))
    assert num_rows(directory) == 0


def test_never_moves_the_old_run_aside_and_keeps_the_data(directory, config):
    (directory.root / "data").mkdir()
    apply_resume(directory, plan_resume(directory, config, "never"))
    assert sorted(path.name for path in directory.root.iterdir()) == [
        "checkpoints",
        "data",
        "metrics.jsonl",
        "previous-1",
    ]
    assert len(read_rows(directory.root / "previous-1" / "metrics.jsonl")) == 9
    assert (num_rows(directory), names(directory)) == (0, [])


def test_never_in_a_new_directory_moves_nothing(tmp_path, config):
    (tmp_path / "new").mkdir()
    assert not plan_resume(RunDirectory(tmp_path / "new"), config, "never").archive


def test_an_own_checkpoint_by_name_sets_later_ones_aside_and_keeps_a_copy_of_the_rows(directory, config):
    plan = plan_resume(directory, config, str(directory.checkpoints / "step-00000004"))
    apply_resume(directory, plan)
    assert names(directory) == ["aside-0-step-00000008", "step-00000004"]
    assert num_rows(directory) == 4
    assert len(read_rows(directory.root / "metrics-until-9.jsonl")) == 9


def test_another_runs_checkpoint_starts_a_new_run(directory, config, tmp_path):
    (tmp_path / "other").mkdir()
    other = RunDirectory(tmp_path / "other")
    plan = plan_resume(other, config, str(directory.checkpoints / "step-00000004"))
    apply_resume(other, plan)
    assert (plan.step, plan.archive, num_rows(other)) == (4, False, 0)
    assert names(directory) == ["step-00000004", "step-00000008"]


def test_a_checkpoint_that_is_not_there_is_refused(directory, config):
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        plan_resume(directory, config, str(directory.checkpoints / "step-00000005"))


def test_another_model_is_refused_naming_what_changed(directory, tiny_config):
    with pytest.raises(ConfigError, match=r"another model: model\.ffn\.d_ff: 16 -> 32"):
        plan_resume(directory, tiny_config("model.ffn.d_ff=32"), "auto")


def test_another_order_of_samples_is_refused_naming_what_changed(directory, tiny_config):
    with pytest.raises(ConfigError, match=r"run\.seed: 0 -> 5"):
        plan_resume(directory, tiny_config("run.seed=5"), "auto")


@pytest.mark.parametrize("text", ["", "a: [", "model: 3"], ids=["empty", "no YAML", "no config"])
def test_a_damaged_config_of_the_run_is_refused(directory, config, text):
    directory.config.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        plan_resume(directory, config, "auto")


@pytest.mark.parametrize(
    "override",
    ["parallel.ep=2", "train.steps=99", "train.lr=0.1", "model.ffn.router.inference={mode: top_k, top_k: 2}"],
)
def test_what_does_not_touch_the_saved_state_may_change(directory, tiny_config, override):
    assert plan_resume(directory, tiny_config(override), "auto").step == 8
