"""``dsmoe calibrate`` as a person meets it."""

import json

import pytest

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.cli.main import main
from dsmoe_ray.inference.routing import resolve_routing
from dsmoe_ray.model.config import RoutingConfig
from dsmoe_ray.model.layer_routing import deployed_routing
from tests.fakes.tiny_artifact import NUM_EXPERTS, TEXT, TOP_K, write_tiny_artifact

BUDGET = "0.5"


@pytest.fixture
def artifact(tmp_path):
    return write_tiny_artifact(tmp_path / "published" / "artifact")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text("".join(f"{TEXT}x{number} = {number * number}\n" for number in range(150)))
    return str(path)


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["calibrate", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_the_choice_is_deployed_and_the_artifact_tells_how_it_was_made(artifact, text_file, capsys):
    before = load_artifact(artifact)
    code, out, err = run(capsys, artifact, "--data", text_file, "--budget", BUDGET, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    after = load_artifact(artifact)
    after.verify()
    assert after.manifest.calibration.model_dump(mode="json") == {
        key: value for key, value in found.items() if key not in ("artifact", "stored_in", "plot")
    }
    assert after.model_config == before.model_config.with_ffn_routing(RoutingConfig.parse(found["routing"]))
    assert deployed_routing(after.model_config) == resolve_routing(found["routing"], before.model_config)
    assert after.manifest.tensors == before.manifest.tensors
    assert (found["budget"], found["method"], found["deployed_before"]) == (0.5, "auto", f"top_k={TOP_K}")
    assert found["stored_in"] == str(artifact) and found["plot"].endswith("artifact-calibration.png")
    assert names(artifact.parent) == ["artifact", "artifact-calibration.png"]
    [chosen] = [point for point in found["frontier"] if point["routing"] == found["routing"]]
    assert chosen["selection_active_ffn_ratio"] <= 0.5


def test_a_person_sees_the_frontier_the_choice_and_where_it_went(artifact, text_file, capsys, tmp_path):
    out_dir, picture = tmp_path / "new", tmp_path / "frontier.svg"
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    options = ["--method", "per_layer_top_k", "--out", out_dir, "--plot", picture]
    code, out, _ = run(capsys, artifact, "--data", text_file, "--budget", BUDGET, *options)
    routing = load_artifact(out_dir).manifest.calibration.routing
    lines = out.splitlines()
    assert code == 0 and any(line.startswith("dense") and "100.0%" in line for line in lines)
    assert any(line.startswith(routing) and "chosen" in line for line in lines)
    assert f"chosen for a budget of 0.5: {routing} (was top_k={TOP_K})" in lines
    assert f"artifact: {out_dir}" in lines and f"picture:  {picture}" in lines
    assert picture.read_text().startswith("<?xml")
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before


def test_a_dry_run_stores_nothing(artifact, text_file, capsys):
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    code, out, _ = run(
        capsys, artifact, "--data", text_file, "--budget", BUDGET, "--dry-run", "--method", "threshold", "--json"
    )
    found = json.loads(out)
    assert code == 0 and found["stored_in"] is None and found["routing"].startswith("threshold=")
    assert found["profile"] is None
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before


def test_a_calibrated_artifact_can_be_calibrated_again(artifact, text_file, capsys):
    first = json.loads(run(capsys, artifact, "--data", text_file, "--budget", BUDGET, "--json")[1])
    second = json.loads(run(capsys, artifact, "--data", text_file, "--budget", "1", "--json")[1])
    assert second["deployed_before"] == first["routing"]
    assert load_artifact(artifact).manifest.calibration.budget == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--budget", "0.2"], f"from 0.25, one of {NUM_EXPERTS} experts, to 1", id="below one expert"),
        pytest.param(["--budget", "1.5"], "to 1, all of them; found 1.5", id="above all"),
        pytest.param(["--method", "best"], "must be one of auto, per_layer_top_k, threshold", id="method"),
        pytest.param(["--max-tokens", "100"], "calibration needs 2048 tokens in two windows", id="few tokens"),
        pytest.param(["--max-tokens", "0"], "max_tokens must be at least 1", id="no tokens"),
        pytest.param(["--seq-len", "33"], "this model takes sequences of 1 to 32 tokens", id="long sequence"),
        pytest.param(["--plot", "picture.jpg"], "must end in one of .png, .svg, .pdf; found '.jpg'", id="picture"),
        pytest.param(["--out", "."], "is there already and not empty", id="target exists"),
        pytest.param(["--out", "new", "--dry-run"], "exclude each other", id="dry run with target"),
        pytest.param(["--data", "/nowhere/at/all"], "no file or directory /nowhere/at/all", id="no data"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(artifact, text_file, capsys, arguments, message):
    before = names(artifact.parent)
    code, out, err = run(capsys, artifact, "--data", text_file, "--budget", BUDGET, *arguments)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1
    assert names(artifact.parent) == before


def test_a_model_without_experts_is_refused(tmp_path, text_file, capsys):
    artifact = write_tiny_artifact(tmp_path / "dense", ffn={"kind": "dense", "d_ff": 8})
    code, _, err = run(capsys, artifact, "--data", text_file, "--budget", BUDGET)
    assert code == 2 and "one dense FFN" in err


def test_data_and_budget_must_be_given(artifact, text_file, capsys):
    for missing, given in (("--budget", ["--data", text_file]), ("--data", ["--budget", BUDGET])):
        code, _, err = run(capsys, artifact, *given)
        assert code == 2 and f"Missing option '{missing}'" in err
