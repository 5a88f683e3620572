"""What an export writes, beside what the numerics tests prove of it."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from dsmoe_ray.artifact.hugging_face.export import export_model
from dsmoe_ray.artifact.hugging_face.export_plan import plan_export
from dsmoe_ray.artifact.hugging_face.formats import Format, their_shapes
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.errors import ArtifactError
from tests.fakes.stock_models import make_config
from tests.unit.artifact.hugging_face.conftest import CONFIGS


@pytest.mark.parametrize("kind", Format)
def test_the_tensors_are_those_that_the_format_lists(make_stock, kind):
    tensors = load_file(make_stock(kind) / "model.safetensors")
    expected = their_shapes(kind, CONFIGS[kind])
    assert {name: tuple(tensors[name].shape) for name in expected} == expected
    assert not any(tensors[name].count_nonzero() for name in tensors.keys() - expected.keys())


def test_files_are_cut_at_the_size_asked_for_and_the_index_says_where_things_are(make_stock):
    directory = make_stock(Format.MIXTRAL, max_file_bytes=60_000)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((directory / name).stat().st_size < 60_000 + 10_000 for name in files), "the header comes on top"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    found = {name: tensor for file in files for name, tensor in load_file(directory / file).items()}
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_a_directory_that_is_in_use_is_left_alone(publish, tmp_path):
    artifact = load_artifact(publish(make_config()))
    plan = plan_export(artifact.model_config, Format.MIXTRAL)
    (tmp_path / "out").mkdir()
    export_model(artifact, tmp_path / "out", plan)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for target in (tmp_path / "out", tmp_path / "out" / "config.json"):
        with pytest.raises(ArtifactError, match=r"is there already and not empty\. Choose another path"):
            export_model(artifact, target, plan)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_damaged_artifact_leaves_no_export(publish, tmp_path):
    directory = publish(make_config())
    [file] = directory.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    artifact = load_artifact(directory)
    with pytest.raises(ArtifactError, match="does not match its SHA-256 digest"):
        export_model(artifact, tmp_path / "out", plan_export(artifact.model_config, Format.MIXTRAL))
    assert sorted(os.listdir(tmp_path)) == ["artifact"]


def test_a_fold_that_would_lose_digits_is_refused(publish, tmp_path):
    artifact = load_artifact(publish(make_config(), dtype=torch.bfloat16))
    plan = plan_export(artifact.model_config, Format.MIXTRAL)
    with pytest.raises(ArtifactError, match=r"gate_scale=3\.0 .* would lose digits. Add --dtype float32"):
        export_model(artifact, tmp_path / "out", plan)
    written = export_model(artifact, tmp_path / "out", plan, dtype=torch.float32)
    assert written.dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_a_fold_of_a_power_of_two_is_exact_in_bfloat16(publish, tmp_path):
    config = make_config().model_dump()
    config["ffn"]["router"]["gate_scale"] = 4.0
    artifact = load_artifact(publish(type(make_config()).model_validate(config), dtype=torch.bfloat16))
    export_model(artifact, tmp_path / "out", plan_export(artifact.model_config, Format.GRANITEMOE))
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.block_sparse_moe.output_linear.weight"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, artifact.load_parameter("blocks.2.ffn.experts.w2").mT * 4.0)


def test_special_tokens_are_told_by_id_and_by_text(make_stock):
    tokens = {"eos_token_id": [0, 7], "bos_token_id": 5, "temperature": 0.5}
    directory = make_stock(Format.MIXTRAL, eos_token_id=None, generation_config=tokens)
    config = json.loads((directory / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (5, [0, 7], None)
    assert json.loads((directory / "generation_config.json").read_text()) == {"max_length": 96, **tokens}
    told = json.loads((directory / "tokenizer_config.json").read_text())
    assert told["eos_token"] == told["pad_token"] == "<|endoftext|>" and len(told["bos_token"]) == 1
    assert not (directory / "chat_template.jinja").exists()


@pytest.mark.parametrize("token", [300, -1, "x", True])
def test_a_special_token_that_the_tokenizer_lacks_is_named(make_stock, token):
    with pytest.raises(ArtifactError, match="as bos_token_id, which the tokenizer does not have"):
        make_stock(Format.MIXTRAL, generation_config={"bos_token_id": token})


def test_a_tokenizer_that_is_none_is_refused(make_stock):
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is not one of the `tokenizers` library"):
        make_stock(Format.MIXTRAL, tokenizer_json="{}")
