"""The command line as a person meets it: exit codes, messages, and what it leaves unloaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe_ray.cli.main import COMMANDS, main, module_name

ROOT = Path(__file__).parents[3]
QUICKSTART = str(ROOT / "examples" / "quickstart.yaml")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsmoe_ray", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("model.ffn.num_expert=4", "unknown key; did you mean 'num_experts'?", id="unknown key"),
        pytest.param("train.steps=many", "train.steps: must be a whole number; found 'many'", id="wrong type"),
        pytest.param("parallel.ep=5", "not divisible by ep * dp_shard", id="experts not divisible"),
        pytest.param("model.ffn.router.inference.top_k=33", "must be at most num_experts", id="k beyond N"),
        pytest.param("parallel.dp_replicate=7", "is not a multiple of seq_len * ranks", id="impossible mesh"),
        pytest.param("model.vocab_size=100", "is too small for bytes", id="vocabulary"),
    ],
)
def test_a_mistake_in_the_config_is_one_message_and_exit_code_2(override, message):
    done = run("validate", QUICKSTART, "--set", override)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["validate", QUICKSTART], ["validate", QUICKSTART, "--json"], ["--help"]])
def test_neither_torch_nor_ray_is_loaded_for_an_answer_about_a_config(arguments):
    script = (
        "import sys\nfrom dsmoe_ray.cli.main import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as left:\n    assert not left.code\n"
        "print(sorted({'torch', 'ray', 'numpy', 'grpc'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")


def test_json_is_one_object_and_nothing_else(capsys):
    code, out, err = run_here(capsys, "validate", QUICKSTART, "--set", "parallel.ep=4", "--json")
    report = json.loads(out)
    assert (code, err, report["ok"], report["num_ranks"]) == (0, "", True, 4)
    assert report["parameters"]["total"] == sum(
        report["parameters"][part] for part in ("embedding", "head", "attention", "ffn", "routers", "norms")
    )
    assert report["memory"]["total_bytes"] > 0 and report["traffic"]["exchange_per_layer_bytes"] > 0


def test_the_tables_name_every_part(capsys):
    code, out, _ = run_here(capsys, "validate", QUICKSTART)
    assert code == 0
    for part in ("non-embedding", "active", "per token", "optimizer", "gathered tokens", "exchange, one layer", "mesh"):
        assert part in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["valdate"], "No such command 'valdate'", id="unknown command"),
        pytest.param(["validate"], "Missing argument", id="no config"),
        pytest.param(["validate", QUICKSTART, "--jsn"], "No such option", id="unknown option"),
        pytest.param(["validate", "absent.yaml"], "cannot read the config file absent.yaml", id="absent file"),
    ],
)
def test_a_mistaken_command_line_is_exit_code_2(capsys, arguments, message):
    code, _, err = run_here(capsys, *arguments)
    assert code == 2
    assert message in err


def test_help_lists_each_command_that_has_a_file(capsys):
    code, out, _ = run_here(capsys, "--help")
    assert code == 0
    for name, summary in COMMANDS.items():
        is_there = (ROOT / "dsmoe_ray" / "cli" / f"{module_name(name)}.py").exists()
        assert (f"  {name} " in out and summary in " ".join(out.split())) == is_there


def test_every_command_file_is_in_the_table():
    files = {path.stem for path in (ROOT / "dsmoe_ray" / "cli").glob("*.py")} - {"__init__", "main"}
    assert files <= {module_name(name) for name in COMMANDS}


def test_an_unexpected_failure_keeps_its_traceback_and_is_exit_code_1():
    script = (
        "import dsmoe_ray.cli.validate as validate\n"
        "from dsmoe_ray.cli.main import main\n"
        "def fail(*_, **__): raise RuntimeError('disk on fire')\n"
        "validate.build_report = fail\n"
        f"main(['validate', {QUICKSTART!r}])"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "disk on fire" in done.stderr


def test_ctrl_c_leaves_quietly(capsys, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dsmoe_ray.cli.validate.build_report", interrupt)
    code, _, err = run_here(capsys, "validate", QUICKSTART)
    assert code == 130
    assert "Traceback" not in err
