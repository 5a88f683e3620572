"""Whatever moment a saving process is killed at, the newest complete checkpoint loads and is one that was saved."""

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from dsmoe_ray.training.checkpoint import CheckpointWriter, load_checkpoint
from dsmoe_ray.training.checkpoint_commit import commit_checkpoint, prepare_checkpoints
from dsmoe_ray.training.checkpoint_store import find_newest_complete, list_checkpoints

NUM_TENSORS = 20


def make_state(step: int) -> dict:
    tensors = {f"w{i}": torch.full((50, 50), float(step * 100 + i)) for i in range(NUM_TENSORS)}
    return {"model": tensors, "position": step}


def save(directory: Path, writer: CheckpointWriter, step: int) -> None:
    part = writer.start_save(make_state(step), step=step).result(30)
    commit_checkpoint(directory, step=step, parts=[part], config_digest="", mesh={}, keep=2)


def check(directory: Path) -> int:
    """Do what a restarted run does; return the step it would resume from, or 0."""
    prepare_checkpoints(directory)
    found = find_newest_complete(directory)
    assert found.refused == ()
    if found.path is None:
        return 0
    loaded = make_state(-1)
    load_checkpoint(found.path, loaded)
    expected = make_state(loaded["position"])
    for name, tensor in expected["model"].items():
        assert torch.equal(loaded["model"][name], tensor), name
    assert found.manifest.step == loaded["position"]
    return loaded["position"]


def save_forever(directory: Path, first_step: int) -> None:
    writer = CheckpointWriter(directory)
    for step in range(first_step, 10_000):
        save(directory, writer, step)
        # Told only after the commit, as a coordinator would: from here on the step must survive.
        with (directory / "told").open("a") as stream:
            stream.write(f"{step}\n")


def fork(function, *arguments) -> int:
    """Run a function in a copy of this process, which has torch loaded already."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # Never back into pytest.
            os._exit(code)
    return pid


@pytest.mark.slow
def test_thirty_kills_at_random_moments_never_cost_a_committed_checkpoint(tmp_path):
    moments = random.Random(0)
    told = tmp_path / "told"
    told.touch()
    resumed = []
    for _ in range(30):
        pid = fork(save_forever, tmp_path, check(tmp_path) + 1)
        try:
            lines_before = len(told.read_text().splitlines())
            deadline = time.monotonic() + 30
            while len(told.read_text().splitlines()) == lines_before:
                assert time.monotonic() < deadline, "no save within 30 s"
                time.sleep(0.001)
            # The child saves all the time, one save taking about 20 ms; so this hits every part of one.
            time.sleep(moments.random() * 0.06)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        last_told = int(told.read_text().splitlines()[-1])
        resumed.append(check(tmp_path))
        # One more may be complete than was told: killed between the commit and the telling.
        assert resumed[-1] in (last_told, last_told + 1)
        assert len(list_checkpoints(tmp_path)) <= 3
    assert resumed == sorted(resumed)


TOUCHES_FILES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def save_and_die(directory: Path, deadly_event: int) -> None:
    """Save step 3, then step 3 again, and die just before the n-th thing that either does to the file system."""
    num_events = 0

    def count(event: str, _arguments: tuple) -> None:
        nonlocal num_events
        if event in TOUCHES_FILES:
            num_events += 1
            if num_events == deadly_event:
                os.kill(os.getpid(), signal.SIGKILL)

    writer = CheckpointWriter(directory)
    sys.addaudithook(count)
    save(directory, writer, 3)
    (directory / "told").touch()
    save(directory, writer, 3)
    (directory / "survived").touch()


@pytest.mark.slow
def test_a_kill_before_every_single_file_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    seen = set()
    before = tmp_path / "before"
    writer = CheckpointWriter(before)
    for step in (1, 2):
        save(before, writer, step)
    writer.close()
    for deadly_event in range(1, 1000):
        directory = tmp_path / str(deadly_event)
        shutil.copytree(before, directory)
        _, status = os.waitpid(fork(save_and_die, directory, deadly_event), 0)
        assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
        survived = (directory / "survived").exists()
        resumed = check(directory)
        assert resumed == 3 or (resumed == 2 and not (directory / "told").exists())
        assert len(list_checkpoints(directory)) <= 3
        seen.add(resumed)
        shutil.rmtree(directory)
        if survived:
            break
    assert seen == {2, 3}
    assert deadly_event > 30, "the hook saw almost no file operation; this test would prove nothing"
