"""The control loop, one move at a time and whole runs, with shards that are not processes."""

import itertools

import pytest

from dsmoe_ray.errors import ConfigError, TrainingError
from dsmoe_ray.training.checkpoint_store import list_checkpoints
from dsmoe_ray.training.coordinator import Coordinator, RunFiles
from dsmoe_ray.training.metrics_log import EventLog, MetricsLog, read_rows
from dsmoe_ray.training.run_directory import RunDirectory
from dsmoe_ray.training.states import (
    Checkpointing,
    Draining,
    Failed,
    Finished,
    Flight,
    Recovering,
    Replies,
    Running,
    RunSteps,
    Save,
    Starting,
)
from dsmoe_ray.training.stop_request import StopRequest
from tests.fakes.fake_reporter import FakeReporter
from tests.fakes.fake_shards import FakeShards


class Setting:
    """A coordinator and everything it works with."""

    def __init__(self, config, root, **script):
        root.mkdir(parents=True, exist_ok=True)
        self.directory = RunDirectory(root)
        self.shards = FakeShards(config.parallel.world_size, self.directory.checkpoints, **script)
        self.stop, self.reporter = StopRequest(), FakeReporter()
        files = RunFiles(self.directory, MetricsLog(self.directory.metrics), EventLog(self.directory.events))
        newest = (list_checkpoints(self.directory.checkpoints) or [None])[-1]
        self.coordinator = Coordinator(
            config,
            shards=self.shards,
            files=files,
            reporter=self.reporter,
            stop=self.stop,
            checkpoint=newest,
        )
        self.directory.checkpoints.mkdir(exist_ok=True)

    def advance(self, until, limit=200):
        """Make moves until the state is of a type; return the types on the way."""
        seen = []
        for _ in range(limit):
            self.coordinator.state = self.coordinator.step()
            seen.append(type(self.coordinator.state))
            if isinstance(self.coordinator.state, until):
                return seen
        raise AssertionError(f"never became {until}; saw {seen}")

    def train_until(self, step):
        """Make moves until this step is done."""
        while not self.steps_in_file or self.steps_in_file[-1] < step:
            self.coordinator.state = self.coordinator.step()

    @property
    def steps_in_file(self):
        return [row["step"] for row in read_rows(self.directory.metrics)]

    @property
    def events(self):
        return [event["event"] for event in read_rows(self.directory.events)]


@pytest.fixture
def make(tiny_config, tmp_path):
    def build(*overrides, **script):
        config = tiny_config("parallel.ep=2", "train.steps=20", "checkpoint.every_steps=5", *overrides)
        return Setting(config, tmp_path / "run", **script)

    return build


@pytest.fixture
def fast_clock(monkeypatch):
    """Every look at the clock takes a second, so that waiting ends."""
    seconds = itertools.count()
    monkeypatch.setattr("dsmoe_ray.training.shard_calls.monotonic_s", lambda: float(next(seconds)))


def test_a_run_goes_from_start_to_end_with_one_row_for_each_step(make):
    setting = make("train.eval_every=10")
    assert setting.coordinator.run() == Finished(20, complete=True)
    assert setting.steps_in_file == list(range(1, 21))
    assert [path.name for path in list_checkpoints(setting.directory.checkpoints)] == ["step-00000015", "step-00000020"]
    assert [metrics.step for metrics in setting.reporter.evaluations] == [10, 20]


def test_shards_meet_before_they_load_and_load_before_they_train(make):
    setting = make()
    assert isinstance(setting.coordinator.step(), Running)
    assert setting.shards.names_asked() == ["describe", "join", "restore"]


def test_two_calls_are_under_way_before_the_first_is_answered(make):
    setting = make("checkpoint.every_steps=null")
    setting.advance(Running)
    flight = Flight(0, last=Save(0))
    asked = setting.coordinator._ask_ahead(flight, saving=False, draining=False).asked
    assert [item.operation for item in asked] == [RunSteps(0, 1), RunSteps(1, 1)]


def test_steps_go_on_while_a_checkpoint_is_written(make):
    setting = make(saves_wait=True)
    setting.advance(Checkpointing)
    for _ in range(3):
        setting.coordinator.state = setting.coordinator.step()
        assert isinstance(setting.coordinator.state, Checkpointing)
    assert setting.steps_in_file[-1] > 5
    assert list_checkpoints(setting.directory.checkpoints) == []
    setting.shards.saves_wait = False
    setting.advance(Running)
    assert [path.name for path in list_checkpoints(setting.directory.checkpoints)] == ["step-00000005"]


def test_the_next_checkpoint_waits_for_the_one_before_it(make):
    setting = make(saves_wait=True)
    setting.advance(Checkpointing)
    for _ in range(30):
        setting.coordinator.state = setting.coordinator.step()
    assert setting.shards.names_asked().count("start_checkpoint") == 1
    assert setting.steps_in_file[-1] == 10


def test_a_lost_shard_goes_through_recovery_back_to_start(make):
    setting = make(dies_at={8: 1})
    seen = setting.advance(Recovering)
    assert seen[-1] is Recovering
    assert setting.coordinator.step() == Starting(generation=1, launch=(1,))


def test_survivors_keep_their_processes_and_no_step_is_skipped_or_doubled(make):
    setting = make(dies_at={8: 1, 17: 0})
    assert setting.coordinator.run() == Finished(20, complete=True)
    assert [shard.launches for _, shard in sorted(setting.shards.shards.items())] == [2, 2]
    assert setting.steps_in_file == list(range(1, 21))
    assert setting.reporter.started == [0, 5, 15]
    assert setting.events.count("recovered") == 2


def test_a_loss_before_the_first_checkpoint_starts_from_the_first_weights(make):
    setting = make(dies_at={3: 0})
    assert setting.coordinator.run() == Finished(20, complete=True)
    assert setting.reporter.started == [0, 0]
    assert setting.steps_in_file == list(range(1, 21))


def test_a_loss_in_the_middle_of_a_save_resumes_from_the_checkpoint_before(make):
    setting = make(dies_when_asked={"finish_checkpoint": 1})
    assert setting.coordinator.run() == Finished(20, complete=True)
    assert setting.reporter.started == [0, 0]
    assert setting.steps_in_file == list(range(1, 21))


@pytest.mark.parametrize("method", ["describe", "join", "restore", "leave", "evaluate", "start_checkpoint"])
def test_a_loss_at_any_other_call_is_recovered_from(make, method):
    setting = make("train.eval_every=4", dies_at={7: 0}, dies_when_asked={method: 1})
    assert setting.coordinator.run() == Finished(20, complete=True)
    assert setting.steps_in_file == list(range(1, 21))


def test_a_hung_shard_is_found_by_ping_and_replaced(make, fast_clock):
    setting = make(hangs_at={8: 1})
    assert setting.coordinator.run() == Finished(20, complete=True)
    assert [shard.launches for _, shard in sorted(setting.shards.shards.items())] == [1, 2]
    assert setting.steps_in_file == list(range(1, 21))


def test_a_shard_that_never_starts_is_replaced(make, fast_clock):
    setting = make()
    setting.shards.launch([0, 1])
    launch = setting.shards.launch

    def launch_one_that_hangs(ranks):
        launch(ranks)
        setting.shards.shards[1].hangs = setting.shards.shards[1].launches == 2

    setting.shards.launch = launch_one_that_hangs
    assert setting.coordinator.run() == Finished(20, complete=True)
    assert setting.shards.shards[1].launches == 3


def test_losses_without_progress_end_the_run(make):
    setting = make("checkpoint.every_steps=null")
    answer = setting.shards._restore

    def die_after_loading(*arguments):
        replies = answer(*arguments)
        setting.shards.shards[0].alive = False
        return replies

    setting.shards._restore = die_after_loading
    with pytest.raises(TrainingError, match="gave up after 4 failures without getting any further"):
        setting.coordinator.run()
    assert setting.events[-1] == "failed"


def test_an_error_of_a_shard_ends_the_run_and_keeps_the_checkpoints(make):
    setting = make(raises_at={12: TrainingError("rank 0: loss was not finite")})
    with pytest.raises(TrainingError, match="loss was not finite"):
        setting.coordinator.run()
    assert list_checkpoints(setting.directory.checkpoints)[-1].name == "step-00000010"


def test_a_run_directory_that_a_shard_does_not_see_is_refused(make):
    setting = make(blind_ranks=(1,))
    with pytest.raises(ConfigError, match="rank 1 on host cannot see"):
        setting.coordinator.run()


def test_a_stop_request_saves_and_ends(make):
    setting = make("checkpoint.every_steps=null")
    setting.train_until(4)
    setting.stop.requested = True
    seen = setting.advance(Finished)
    assert Draining in seen
    step = setting.coordinator.state.step
    assert setting.coordinator.state == Finished(step, complete=False)
    assert setting.steps_in_file == list(range(1, step + 1))
    assert [path.name for path in list_checkpoints(setting.directory.checkpoints)] == [f"step-{step:08d}"]


def test_a_stop_request_while_a_checkpoint_is_written_waits_for_it(make):
    setting = make(saves_wait=True)
    setting.advance(Checkpointing)
    setting.stop.requested = True
    setting.advance(Draining)
    setting.shards.saves_wait = False
    setting.advance(Finished)
    newest = list_checkpoints(setting.directory.checkpoints)[-1]
    assert newest.name == f"step-{setting.steps_in_file[-1]:08d}"


def test_a_stop_request_before_the_first_step_ends_at_once(make):
    setting = make(hangs_at={})
    setting.shards.launch([0, 1])
    setting.shards.shards[1].hangs = True
    setting.shards.launch = lambda ranks: None
    setting.stop.requested = True
    assert setting.coordinator.run() == Finished(0, complete=False)


def test_a_loss_while_stopping_ends_with_the_last_checkpoint(make):
    setting = make(dies_at={8: 1})
    setting.train_until(5)
    setting.advance(Running)
    setting.stop.requested = True
    setting.advance(Finished)
    assert setting.coordinator.state == Finished(5, complete=False)


def test_a_stopped_run_goes_on_where_it_ended(make):
    first = make()
    first.train_until(7)
    first.stop.requested = True
    first.advance(Finished)
    second = make()
    assert second.coordinator.run() == Finished(20, complete=True)
    assert second.reporter.started == [first.coordinator.state.step]
    assert second.steps_in_file == list(range(1, 21))


def test_replies_that_failed_are_told_from_those_that_wait():
    assert not Replies(waiting=(0, 1)).failed
    assert Replies(values={0: 1}, lost={1: "killed"}).failed


def test_a_failed_state_carries_its_error(make):
    setting = make(raises_at={3: ValueError("bug")})
    setting.advance(Failed)
    assert "rank 0 failed: ValueError: bug" in str(setting.coordinator.state.error)
