"""``dsmoe export`` and ``dsmoe import`` as a person meets them."""

import json

import pytest

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.cli.main import main
from tests.fakes.stock_models import draw_weights, make_config, make_tokenizer


def write(directory, config, **arguments):
    required = {"tokenizer_json": make_tokenizer().to_json(), "provenance": {}, "eos_token_id": 0}
    save_artifact(directory, model_config=config, tensors=draw_weights(config), **(required | arguments))
    return str(directory)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("published") / "artifact", make_config(), chat_template="{{ messages }}")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_a_model_goes_out_and_comes_back(artifact, tmp_path, capsys):
    stock, back = str(tmp_path / "stock"), str(tmp_path / "back")
    code, out, err = run(capsys, "export", artifact, stock, "--format", "mixtral")
    assert (code, err) == (0, "")
    assert out.startswith(f"{stock}: mixtral, float32, top_k=2, ") and len(out.splitlines()) == 1
    code, out, err = run(capsys, "import", stock, back)
    assert (code, err, out) == (0, "", f"{back}: 78 tensors of a mixtral model\n")
    found = load_artifact(tmp_path / "back")
    assert found.chat_template == "{{ messages }}"
    assert found.manifest.provenance["imported_from"] == "mixtral"
    assert run(capsys, "generate", back, "--prompt", "def", "--max-tokens", "3")[0] == 0


def test_json_is_one_object_and_nothing_else(artifact, tmp_path, capsys):
    stock, back = str(tmp_path / "stock"), str(tmp_path / "back")
    arguments = ["--format", "qwen2_moe", "--routing", "dense", "--dtype", "float32", "--max-file-bytes", "60000"]
    code, out, err = run(capsys, "export", artifact, stock, *arguments, "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert (report["format"], report["top_k"], report["dtype"]) == ("qwen2_moe", 6, "float32")
    assert report["routing_changes"] == [
        "ffn: the artifact deploys top_k=2, the qwen2_moe model runs top_k=6 of 6 experts"
    ]
    assert "model.safetensors.index.json" in report["files"]
    code, out, err = run(capsys, "import", stock, back, "--json")
    report = json.loads(out)
    assert (code, err, report["format"], report["has_chat_template"]) == (0, "", "qwen2_moe", True)
    assert report["routing"]["ffn"]["inference"]["top_k"] == 6


def test_a_change_of_routing_is_told_to_a_person(artifact, tmp_path, capsys):
    arguments = ["export", artifact, str(tmp_path / "out"), "--format", "mixtral", "--routing", "top_k=3"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert "routing changes: ffn: the artifact deploys top_k=2, the mixtral model runs top_k=3" in out


def test_folded_multipliers_are_told_to_a_person(artifact, tmp_path, capsys):
    stock = tmp_path / "stock"
    run(capsys, "export", artifact, str(stock), "--format", "granitemoe")
    fields = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps(fields | {"logits_scaling": 6.0}))
    code, out, _ = run(capsys, "import", str(stock), str(tmp_path / "back"))
    assert code == 0 and "folded: logits_scaling=6.0 into the last norm" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--format", "jetmoe"], "Nearest possible format: granitemoe or mixtral or qwen2_moe.", id="cannot"
        ),
        pytest.param(["--format", "llama"], "Invalid value for '--format'", id="format"),
        pytest.param([], "Missing option '--format'", id="no format"),
        pytest.param(["--format", "mixtral", "--routing", "threshold=0.5"], "run dense or top_k=K only", id="routing"),
        pytest.param(["--format", "mixtral", "--routing", "top_k=7"], "more than its 6 FFN experts", id="k beyond N"),
        pytest.param(
            ["--format", "mixtral", "--max-file-bytes", "0"], "Invalid value for '--max-file-bytes'", id="file size"
        ),
    ],
)
def test_a_mistaken_export_is_one_message_and_leaves_nothing(artifact, tmp_path, capsys, arguments, message):
    code, out, err = run(capsys, "export", artifact, str(tmp_path / "out"), *arguments)
    assert (code, out) == (2, "") and message in " ".join(err.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["export", "import"])
def test_a_directory_in_use_is_refused_before_anything_is_read(command, tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    options = ["--format", "mixtral"] if command == "export" else []
    code, _, err = run(capsys, command, str(tmp_path / "absent"), str(tmp_path), *options)
    assert code == 2 and "is there already and not empty" in err and len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(artifact, tmp_path, capsys):
    stock = tmp_path / "stock"
    run(capsys, "export", artifact, str(stock), "--format", "mixtral")
    (stock / "tokenizer.json").write_text('{"version": "1.0"}')
    code, _, err = run(capsys, "import", str(stock), str(tmp_path / "back"))
    assert code == 2 and "is not a tokenizer.json" in err
    assert not (tmp_path / "back").exists()


def test_a_place_that_cannot_be_written_is_a_mistake_too(artifact, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run(capsys, "export", artifact, str(tmp_path / "stock"), "--format", "mixtral")
    inside = str(tmp_path / "file" / "out")
    for arguments in (["export", artifact, inside, "--format", "mixtral"], ["import", str(tmp_path / "stock"), inside]):
        code, _, err = run(capsys, *arguments)
        assert code == 2 and "out cannot be " in err and len(err.splitlines()) == 1
