"""``dsmoe evaluate`` as a person meets it."""

import json

import numpy as np
import pytest
import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.cli.main import main
from dsmoe_ray.data.shard_writer import TokenShardWriter
from tests.fakes.tiny_artifact import NUM_EXPERTS, TEXT, TOP_K, make_config, make_tokenizer, write_tiny_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> str:
    return str(write_tiny_artifact(tmp_path_factory.mktemp("published") / "artifact"))


@pytest.fixture
def text_file(tmp_path) -> str:
    path = tmp_path / "text.py"
    path.write_text(TEXT * 30)
    return str(path)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *arguments])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_json_is_one_object_with_dense_and_deployed_routing(artifact, text_file, capsys):
    code, out, err = run(capsys, artifact, "--data", text_file, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert (found["artifact"], found["data"]) == (artifact, text_file)
    dense, deployed = found["settings"]
    assert (dense["routing"], deployed["routing"]) == ("dense", f"top_k={TOP_K}")
    assert (dense["mean_kept_ffn_experts"], deployed["mean_kept_ffn_experts"]) == (NUM_EXPERTS, TOP_K)
    assert deployed["active_ffn_parameters"] == found["ffn_parameters"] * TOP_K // NUM_EXPERTS
    for setting in found["settings"]:
        assert setting["perplexity"] == pytest.approx(np.exp(setting["loss"]))
    assert deployed["perplexity_over_dense_ratio"] == pytest.approx(deployed["perplexity"] / dense["perplexity"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU measures in bfloat16")
def test_weights_stored_in_bfloat16_are_measured_in_float32(text_file, tmp_path, capsys):
    narrow = load_artifact(write_tiny_artifact(tmp_path / "narrow", dtype=torch.bfloat16))
    save_artifact(
        tmp_path / "wide",
        model_config=narrow.model_config,
        tensors=((name, tensor.float()) for name, tensor in narrow.load_state_dict().items()),
        tokenizer_json=narrow.tokenizer_json,
        provenance={},
        eos_token_id=narrow.eos_token_ids[0],
    )
    settings = [
        json.loads(run(capsys, str(tmp_path / name), "--data", text_file, "--json")[1])["settings"]
        for name in ("narrow", "wide")
    ]
    assert [one["loss"] for one in settings[0]] == [one["loss"] for one in settings[1]]


def test_the_table_has_a_row_for_each_setting(artifact, text_file, capsys):
    specs = ["dense", "top_k=1", "threshold=0.5", "threshold_top_k=0.9", "top_p=0.6"]
    code, out, _ = run(capsys, artifact, "--data", text_file, *(word for spec in specs for word in ("--routing", spec)))
    rows = [line.split()[0] for line in out.splitlines()[2:]]
    assert code == 0 and rows == specs
    assert "1.0" in out.splitlines()[3] and "25%" in out.splitlines()[3]


def test_prepared_data_gives_the_same_as_its_text(artifact, text_file, tmp_path, capsys):
    tokenizer = make_tokenizer(make_config())
    ids = np.append(tokenizer.encode(TEXT * 30), tokenizer.end_of_text_id)
    writer = TokenShardWriter(tmp_path / "held_out", tokenizer=tokenizer, vocab_size=300, shard_tokens=100)
    writer.append(ids, np.array([len(ids)]))
    writer.finish()
    losses = []
    # The directory of the shards, and the one above it that prepares data for a run.
    for data in (text_file, str(tmp_path / "held_out"), str(tmp_path)):
        losses.append(json.loads(run(capsys, artifact, "--data", data, "--json")[1])["settings"][0]["loss"])
    assert losses[0] == losses[1] == losses[2]


def test_limits_are_kept(artifact, text_file, capsys):
    limits = ["--max-tokens", "70", "--seq-len", "16"]
    found = json.loads(run(capsys, artifact, "--data", text_file, "--json", *limits)[1])
    assert (found["num_tokens"], found["seq_len"]) == (64, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--routing", "all"], "'all' is not one of dense, top_k=K", id="routing"),
        pytest.param(["--routing", "top_k=9"], "top_k must be at most num_experts", id="k beyond N"),
        pytest.param(["--max-tokens", "0"], "max_tokens must be at least 1", id="no tokens"),
        pytest.param(["--seq-len", "33"], "this model takes sequences of 1 to 32 tokens", id="long sequence"),
        pytest.param(["--data", ""], "the data '': paths[0]", id="empty path"),
        pytest.param(["--include", "a/b"], "include holds 'a/b'; give a name without '/'", id="impossible pattern"),
        pytest.param(["--data", "/nowhere/at/all"], "no file or directory /nowhere/at/all", id="no data"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(artifact, text_file, capsys, arguments, message):
    code, out, err = run(capsys, artifact, "--data", text_file, *arguments)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1


def test_data_must_be_given(artifact, capsys):
    code, _, err = run(capsys, artifact)
    assert code == 2 and "Missing option '--data'" in err


def test_shards_of_another_tokenizer_are_refused(tmp_path, artifact, capsys):
    other = make_tokenizer(make_config(vocab_size=280))
    writer = TokenShardWriter(tmp_path / "held_out", tokenizer=other, vocab_size=280, shard_tokens=100)
    writer.append(other.encode(TEXT), np.array([len(other.encode(TEXT))]))
    writer.finish()
    code, _, err = run(capsys, artifact, "--data", str(tmp_path))
    assert code == 2 and "another tokenizer" in err
