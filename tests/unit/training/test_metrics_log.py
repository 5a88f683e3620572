"""The files of a run: one row for each step, whatever happens while they are written."""

import json

import pytest

from dsmoe_ray.errors import CheckpointError, TrainingError
from dsmoe_ray.training.metrics_log import EventLog, MetricsLog, read_rows
from tests.fakes.fake_shards import make_metrics


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def append(path, first, last):
    MetricsLog(path).append([make_metrics(step) for step in range(first, last + 1)])


def steps(path):
    return [row["step"] for row in read_rows(path)]


def test_a_row_has_what_readers_build_on(path):
    append(path, 1, 1)
    [row] = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"step", "loss", "tokens", "step_time_s"} <= row.keys()


def test_rows_of_steps_to_be_done_again_are_cut_off(path):
    append(path, 1, 9)
    log = MetricsLog(path)
    log.keep_until(6)
    log.append([make_metrics(7)])
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("num_chars", [1, 20, -1], ids=["start", "middle", "all but the newline"])
def test_a_torn_last_row_counts_as_not_written(path, num_chars):
    append(path, 1, 3)
    whole = path.read_text()
    line = json.dumps(make_metrics(4).to_json()) + "\n"
    path.write_text(whole + line[:num_chars])
    log = MetricsLog(path)
    assert log.step == 3
    log.keep_until(3)
    log.append([make_metrics(4)])
    assert steps(path) == [1, 2, 3, 4]


@pytest.mark.parametrize("step", [2, 5], ids=["doubled", "missing"])
def test_a_step_that_does_not_follow_is_refused(path, step):
    append(path, 1, 3)
    with pytest.raises(TrainingError, match=f"step {step} was reported after step 3"):
        MetricsLog(path).append([make_metrics(step)])


def test_a_checkpoint_beyond_the_last_row_is_refused(path):
    append(path, 1, 3)
    with pytest.raises(CheckpointError, match="ends at step 3, but the checkpoint to resume from is of step 5"):
        MetricsLog(path).keep_until(5)


def test_a_run_from_another_runs_checkpoint_begins_at_its_step(path):
    log = MetricsLog(path)
    log.keep_until(100)
    log.append([make_metrics(101)])
    assert steps(path) == [101]


def test_a_loss_that_is_not_finite_is_null(path):
    MetricsLog(path).append([make_metrics(1, loss=float("nan")), make_metrics(2, loss=float("inf"))])
    assert [row["loss"] for row in read_rows(path)] == [None, None]
    assert "NaN" not in path.read_text()


def test_events_keep_their_order_and_their_lists(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.add("started", step=0)
    log.add("evaluation", load_share=[[0.5, float("nan")]])
    rows = read_rows(tmp_path / "events.jsonl")
    assert [row["event"] for row in rows] == ["started", "evaluation"]
    assert rows[1]["load_share"] == [[0.5, None]]
