"""One rank as the coordinator drives it, in this process and alone in its world."""

import numpy as np
import pytest
import torch

from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.errors import ExchangeError, TrainingError
from dsmoe_ray.training import shard_worker
from dsmoe_ray.training.checkpoint_commit import commit_checkpoint
from dsmoe_ray.training.shard_group import ShardSetup
from dsmoe_ray.training.shard_worker import ExpertShardWorker
from tests.fakes.fake_shards import make_metrics


@pytest.fixture
def worker(tiny_config, tmp_path, monkeypatch):
    documents = [np.random.default_rng(number).integers(1, 300, size=200) for number in range(20)]
    shards = TokenShards.from_documents(documents, vocab_size=300)
    monkeypatch.setattr(shard_worker.TokenShards, "open", lambda directory: shards)
    setup = ShardSetup(tiny_config(), tmp_path, tmp_path, tmp_path / "checkpoints", "cpu")
    worker, num_threads = ExpertShardWorker(setup, rank=0), torch.get_num_threads()
    yield worker
    worker.leave()
    torch.set_num_threads(num_threads)


def join(worker, checkpoint=None):
    worker.join("127.0.0.1", 1)
    return worker.restore(checkpoint)


def save(worker, tmp_path, step):
    worker.start_checkpoint(step)
    part = worker.finish_checkpoint()
    return commit_checkpoint(tmp_path / "checkpoints", step=step, parts=[part], config_digest="", mesh={}, keep=2)


def losses(rows):
    return [row.loss for row in rows]


def test_a_shard_tells_where_it_is_and_what_it_sees(worker, tmp_path):
    (tmp_path / "probe").write_text("token")
    found = worker.describe(tmp_path / "probe", address="10.0.0.7", node_id="abc")
    assert (found.address, found.node_id, found.probe) == ("10.0.0.7", "abc", "token")
    assert 0 < found.free_port < 65536
    assert worker.describe(tmp_path / "nothing").probe is None


def test_a_new_world_goes_on_from_a_checkpoint_with_the_same_losses(worker, tmp_path):
    assert join(worker) == 0
    worker.run_steps(2)
    checkpoint = save(worker, tmp_path, 2)
    expected = losses(worker.run_steps(3))
    worker.leave()
    assert join(worker, checkpoint) == 2
    assert losses(worker.run_steps(3)) == expected


def test_steps_may_go_on_while_a_copy_is_written(worker, tmp_path):
    join(worker)
    worker.run_steps(1)
    worker.start_checkpoint(1)
    expected = losses(worker.run_steps(2))
    part = worker.finish_checkpoint()
    path = commit_checkpoint(tmp_path / "checkpoints", step=1, parts=[part], config_digest="", mesh={}, keep=2)
    worker.leave()
    join(worker, path)
    assert losses(worker.run_steps(2)) == expected


def test_outside_of_a_world_calls_fail_as_they_do_when_a_peer_is_gone(worker):
    for call in (lambda: worker.run_steps(1), worker.evaluate, lambda: worker.restore(None)):
        with pytest.raises(ExchangeError, match="rank 0 is not in a world"):
            call()


def test_after_a_failed_collective_queued_calls_do_not_enter_the_world_again(worker, monkeypatch):
    join(worker)
    monkeypatch.setattr(worker._trainer, "run_step", lambda: (_ for _ in ()).throw(ExchangeError("peer gone")))
    with pytest.raises(ExchangeError, match="peer gone"):
        worker.run_steps(1)
    with pytest.raises(ExchangeError, match="not in a world"):
        worker.run_steps(1)


def test_steps_before_a_failing_one_are_told_before_the_failure(worker, monkeypatch):
    join(worker)
    steps = iter([make_metrics(1), make_metrics(2)])

    def run_step():
        row = next(steps, None)
        if row is None:
            raise TrainingError("not finite")
        return row

    monkeypatch.setattr(worker._trainer, "run_step", run_step)
    assert [row.step for row in worker.run_steps(5)] == [1, 2]
    with pytest.raises(TrainingError, match="not finite"):
        worker.run_steps(5)


def test_a_ping_tells_how_long_a_step_has_been_running(worker, monkeypatch):
    assert worker.ping().busy_s is None
    join(worker)
    monkeypatch.setattr(worker._trainer, "evaluate", worker.ping)
    assert worker.evaluate().busy_s >= 0.0
    assert worker.ping().busy_s is None


def test_the_threads_of_a_shard_are_those_that_were_reserved(worker, monkeypatch):
    asked = []
    monkeypatch.setattr(shard_worker.torch, "set_num_threads", asked.append)
    join(worker)
    assert asked == [1]
