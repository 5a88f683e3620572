"""Whole runs of ``dsmoe train`` on a local cluster: to the end, stopped, killed, resumed; losses are equal to a bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsmoe_ray import clock
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.training.checkpoint_store import find_newest_complete, list_checkpoints
from dsmoe_ray.training.metrics_log import read_rows

pytestmark = pytest.mark.ray

STEPS = 60
# Generous: the machine may be busy, and time is not what these tests judge.
DEADLINE_S = 150.0


class Job:
    """One ``dsmoe train`` process and the run directory it writes to."""

    def __init__(self, config, run_dir, *arguments, address=None):
        self.run_dir = Path(run_dir)
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "dsmoe_ray", "train", str(config), "--set", f"run.dir={run_dir}", *arguments]
        if address is not None:
            command += ["--address", address]
        self.log = self.run_dir.with_suffix(".log")
        with self.log.open("a") as stream:
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)

    @property
    def rows(self):
        return read_rows(self.run_dir / "metrics.jsonl")

    @property
    def events(self):
        return read_rows(self.run_dir / "events.jsonl")

    def events_of(self, name):
        return [event for event in self.events if event["event"] == name]

    def shard_pids(self):
        return self.events_of("shards")[-1]["process_ids"]

    def wait_for_step(self, step):
        """Return once this step is done, while the run goes on."""
        end_s = clock.monotonic_s() + DEADLINE_S
        while len(self.rows) < step:
            assert self.process.poll() is None, self.log.read_text()
            assert clock.monotonic_s() < end_s, self.log.read_text()
            clock.sleep_s(0.01)

    def finish(self):
        """Wait for the end and return the exit code."""
        return self.process.wait(timeout=DEADLINE_S)

    def kill(self):
        """End the process and its shards as a power cut would, if they are still there."""
        for pid in [self.process.pid, *(self.shard_pids() if self.events_of("shards") else [])]:
            kill_if_there(pid)
        self.process.wait()


def kill_if_there(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The YAML of a tiny run on two ranks, with its text."""
    root = tmp_path_factory.mktemp("training")
    (root / "text").mkdir()
    for number in range(60):
        lines = [f"file {number} line {line}: {number} times {line} is {number * line}.\n" for line in range(40)]
        (root / "text" / f"{number}.txt").write_text("".join(lines))
    values = {
        "run": {"name": "tiny", "dir": "given on the command line", "seed": 1},
        "model": {
            "vocab_size": 300,
            "d_model": 32,
            "num_layers": 2,
            "max_seq_len": 32,
            "attention": {"kind": "moa", "num_experts": 2, "num_kv_heads": 1, "head_dim": 16},
            "ffn": {
                "kind": "moe",
                "num_experts": 8,
                "d_ff": 16,
                "router": {"inference": {"mode": "top_k", "top_k": 2}},
            },
        },
        "data": {"paths": [str(root / "text")], "prepared_dir": str(root / "prepared")},
        "parallel": {"ep": 2, "timeout_s": 30},
        "train": {
            "steps": STEPS,
            "seq_len": 32,
            "num_tokens_per_step": 512,
            "lr": 1.0e-3,
            "loss": {"mutual_information_ffn": 0.01},
            "eval_every": 30,
            "eval_tokens": 256,
        },
        "checkpoint": {"every_steps": 12},
    }
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def start(config, ray_cluster, tmp_path):
    """Return a starter of jobs in one run directory on the shared cluster."""
    jobs = []

    def run(*arguments, run_dir=tmp_path / "run"):
        jobs.append(Job(config, run_dir, *arguments, address=ray_cluster))
        return jobs[-1]

    yield run
    for job in jobs:
        if job.process.poll() is None:
            job.kill()


@pytest.fixture(scope="module")
def undisturbed(config, ray_cluster, tmp_path_factory):
    """A run that nothing happened to."""
    job = Job(config, tmp_path_factory.mktemp("undisturbed") / "run", address=ray_cluster)
    assert job.finish() == 0, job.log.read_text()
    return job


def assert_same_training(job, undisturbed):
    assert [row["step"] for row in job.rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in job.rows] == [row["loss"] for row in undisturbed.rows]


def test_a_run_leaves_everything_it_promises(undisturbed):
    root = undisturbed.run_dir
    rows = undisturbed.rows
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {"step", "loss", "tokens", "step_time_s"} <= rows[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [event["step"] for event in undisturbed.events_of("evaluation")] == [30, 60]
    assert [path.name for path in list_checkpoints(root / "checkpoints")] == ["step-00000048", "step-00000060"]
    assert (root / "config.yaml").is_file()
    assert {path.name for path in (root / "plots").iterdir()} == {"loss.png", "routing.png"}
    artifact = load_artifact(root / "artifact")
    assert artifact.manifest.provenance["step"] == STEPS
    assert len(artifact.load_state_dict()) > 10


def test_what_a_run_prints_says_where_things_are_and_what_to_type_next(undisturbed):
    text = undisturbed.log.read_text()
    assert f"run directory: {undisturbed.run_dir}" in text
    assert f"step {STEPS}/{STEPS}" in text
    assert f"dsmoe generate {undisturbed.run_dir / 'artifact'}" in text
    assert "Traceback" not in text


def test_a_finished_run_does_nothing_more(undisturbed, config):
    # Its lock is a file too.
    files = [path for path in undisturbed.run_dir.rglob("*") if path.is_file() and path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    # No cluster is there to answer: none is needed.
    again = Job(config, undisturbed.run_dir, address="127.0.0.1:1")
    assert again.finish() == 0
    assert "This run is complete at step 60" in again.log.read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_sigterm_saves_and_the_same_command_goes_on(start, undisturbed):
    job = start()
    job.wait_for_step(20)
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 0
    stopped_at = len(job.rows)
    assert 20 <= stopped_at < STEPS
    assert list_checkpoints(job.run_dir / "checkpoints")[-1].name == f"step-{stopped_at:08d}"
    assert f"Stopped at step {stopped_at} of {STEPS}. The same command continues the run" in job.log.read_text()
    again = start()
    assert again.finish() == 0
    assert again.events_of("started")[-1]["step"] == stopped_at
    assert_same_training(again, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_shard_is_replaced_and_the_losses_stay_the_same(start, undisturbed, rank):
    job = start()
    job.wait_for_step(30)
    before = job.shard_pids()
    os.kill(before[rank], signal.SIGKILL)
    assert job.finish() == 0, job.log.read_text()
    assert_same_training(job, undisturbed)
    after = job.shard_pids()
    assert after[1 - rank] == before[1 - rank] and after[rank] != before[rank]
    [loss] = job.events_of("shards_lost")
    assert list(loss["lost"]) == [str(rank)]


def test_a_hung_shard_is_replaced(start, undisturbed):
    job = start("--set", "parallel.timeout_s=4")
    job.wait_for_step(30)
    os.kill(job.shard_pids()[1], signal.SIGSTOP)
    assert job.finish() == 0, job.log.read_text()
    assert list(job.events_of("shards_lost")[0]["lost"]) == ["1"]
    assert_same_training(job, undisturbed)


def test_a_job_killed_three_times_loads_its_newest_checkpoint_each_time(start, undisturbed):
    for step in (15, 30, 45):
        job = start()
        job.wait_for_step(step)
        job.kill()
        search = find_newest_complete(job.run_dir / "checkpoints")
        assert search.refused == ()
        assert search.manifest is not None and search.manifest.step >= step - 12
    job = start()
    assert job.finish() == 0, job.log.read_text()
    first, *others = [event["step"] for event in job.events_of("started")]
    assert first == 0 and len(others) == 3 and all(step > 0 for step in others)
    assert_same_training(job, undisturbed)


def test_a_run_of_two_ranks_goes_on_with_four(start, undisturbed):
    job = start()
    job.wait_for_step(20)
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 0
    stopped_at = len(job.rows)
    again = start("--set", "parallel.dp_shard=2")
    assert again.finish() == 0, again.log.read_text()
    losses = [row["loss"] for row in again.rows]
    expected = [row["loss"] for row in undisturbed.rows]
    assert losses[:stopped_at] == expected[:stopped_at]
    # Sums over ranks are formed in another order: float32 rounding, grown over forty steps.
    assert losses == pytest.approx(expected, abs=2e-3)


def test_a_cluster_that_is_too_small_is_told_at_once(start):
    job = start("--set", "parallel.cpus_per_shard=100")
    assert job.finish() == 2
    text = job.log.read_text()
    assert "cannot hold 2 shards of 100 CPU each" in text and "Traceback" not in text


def test_a_run_starts_a_local_ray_of_its_own_and_ends_it(config, tmp_path, undisturbed):
    job = Job(config, tmp_path / "run")
    assert job.finish() == 0, job.log.read_text()
    assert_same_training(job, undisturbed)
    assert "dashboard: http://127.0.0.1:" in job.log.read_text()
    # The process that ran on Ray's behalf is gone with it.
    assert not any(Path(f"/proc/{pid}").exists() for pid in job.shard_pids())


def test_events_and_metrics_are_json_that_any_reader_takes(undisturbed):
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (undisturbed.run_dir / name).read_text().splitlines()
        assert lines
        assert all(isinstance(json.loads(line, parse_constant=pytest.fail), dict) for line in lines)
