"""``dsmoe train`` as far as it needs no Ray: refusals, the dry run, and a run that is over."""

import subprocess
import sys

import pytest
import yaml

from dsmoe_ray import clock
from dsmoe_ray.cli.main import main


@pytest.fixture
def config_file(tiny_values, text_dir, tmp_path):
    def write(**changes):
        tiny_values["train"].update(changes)
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(tiny_values))
        return str(path)

    return write


def run(capsys, *words):
    """Return the exit code, stdout and stderr of one command line."""
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    output = capsys.readouterr()
    return ended.value.code or 0, output.out, output.err


def test_a_dry_run_prints_the_report_and_rehearses_a_step(capsys, config_file, tmp_path):
    code, out, _ = run(capsys, config_file(), "--dry-run")
    assert code == 0
    assert "memory per rank" in out and "dry run: rank 0 of 1, 8 x 16 tokens through 2 layers" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "train.stepz=1"], "did you mean 'steps'"),
        (["--set", "parallel.ep=3"], "not divisible by ep"),
        (["--set", "model.vocab_size=10"], "vocab_size=10 is too small"),
        (["--resume", "nowhere/step-00000001"], "there is no such checkpoint"),
        (["--dry-run", "--set", "parallel.exchange_chunks=4096"], "exchange_chunks=4096"),
    ],
    ids=["unknown key", "mesh", "vocabulary", "resume", "dry run"],
)
def test_a_mistake_ends_with_one_message_and_code_2(capsys, config_file, words, message):
    code, _, err = run(capsys, config_file(), *words)
    assert code == 2
    assert message in err and "Traceback" not in err


def test_a_mistake_is_told_within_two_seconds_in_a_process_of_its_own(config_file):
    command = [sys.executable, "-m", "dsmoe_ray", "train", config_file(), "--set", "train.stepz=1"]
    # Twice the limit for a busy machine; loading torch or Ray would take longer still.
    start_s = clock.monotonic_s()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2
    assert clock.monotonic_s() - start_s < 4.0


def test_neither_torch_nor_ray_is_loaded_to_refuse():
    code = "import sys, dsmoe_ray.cli.train; assert not {'torch', 'ray'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_coordinator_loads_no_torch():
    code = "import sys, dsmoe_ray.training.run; assert 'torch' not in sys.modules, 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)
