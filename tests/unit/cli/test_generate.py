"""``dsmoe generate`` as a person meets it."""

import pytest

from dsmoe_ray.cli.main import main
from tests.fakes.tiny_artifact import write_tiny_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> str:
    return str(write_tiny_artifact(tmp_path_factory.mktemp("published") / "artifact"))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["generate", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_text_goes_to_standard_output_and_its_speed_to_standard_error(artifact, capsys):
    code, out, err = run(capsys, artifact, "--prompt", "def add(", "--max-tokens", "6")
    assert code == 0
    assert out.endswith("\n") and not out.endswith("\n\n") and len(out) > 1
    assert err.startswith("6 tokens, ") and "tokens/s" in err and len(err.splitlines()) == 1


def test_the_seed_decides_the_text(artifact, capsys):
    def text(seed: int) -> str:
        arguments = ["--prompt", "def", "--max-tokens", "12", "--temperature", "1.2", "--seed", str(seed)]
        return run(capsys, artifact, *arguments)[1]

    assert text(1) == text(1) != text(2)


def test_routing_changes_the_text(artifact, capsys):
    texts = {
        spec: run(capsys, artifact, "--prompt", "return", "--max-tokens", "12", "--routing", spec)[1]
        for spec in ("deployed", "top_k=2", "top_k=1", "dense")
    }
    assert texts["deployed"] == texts["top_k=2"]
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--prompt", ""], "the prompt is empty", id="empty prompt"),
        pytest.param(["--prompt", "x" * 40], "this model takes at most 31", id="long prompt"),
        pytest.param(["--prompt", "x", "--routing", "topk=2"], "is not one of dense, top_k=K", id="routing"),
        pytest.param(["--prompt", "x", "--routing", "top_k=9"], "at most num_experts", id="k beyond N"),
        pytest.param(["--prompt", "x", "--temperature", "-1"], "temperature must be", id="temperature"),
        pytest.param(["--prompt", "x", "--top-p", "2"], "top_p must be", id="top_p"),
        pytest.param(["--prompt", "x", "--max-tokens", "0"], "max_tokens must be at least 1", id="max tokens"),
        pytest.param([], "Missing option '--prompt'", id="no prompt"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(artifact, capsys, arguments, message):
    code, out, err = run(capsys, artifact, *arguments)
    assert (code, out) == (2, "") and message in err


def test_no_artifact_is_a_mistake_too(tmp_path, capsys):
    code, _, err = run(capsys, str(tmp_path), "--prompt", "x")
    assert code == 2 and "holds no artifact" in err and len(err.splitlines()) == 1
