"""``dsmoe inspect`` describes an artifact and finds damage."""

import json

import pytest
import torch

from dsmoe_ray.artifact.layout import model_shapes
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.cli.main import main
from dsmoe_ray.model.config import GqaConfig, ModelConfig, MoeConfig, RouterConfig, RoutingConfig


@pytest.fixture
def artifact(tmp_path):
    config = ModelConfig(
        vocab_size=11,
        d_model=8,
        num_layers=2,
        max_seq_len=4,
        attention=GqaConfig(kind="gqa", num_heads=2, num_kv_heads=1, head_dim=4),
        ffn=MoeConfig(
            kind="moe",
            num_experts=3,
            d_ff=6,
            router=RouterConfig(inference=RoutingConfig(mode="top_k", top_k=2)),
        ),
    )
    save_artifact(
        tmp_path / "artifact",
        model_config=config,
        tensors=[(name, torch.ones(shape)) for name, shape in model_shapes(config).items()],
        tokenizer_json="{}",
        provenance={"run": "[the run]", "step": 7},
    )
    return tmp_path / "artifact"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *map(str, arguments)])
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_a_person_sees_parameters_routing_provenance_and_files(artifact, capsys):
    code, out, err = run(capsys, artifact, "--verify")
    assert (code, err) == (0, "")
    for text in ("2 layers", "num_experts 3", "top_k 2", "[the run]", "model-00001-of-00001.safetensors"):
        assert text in out
    assert "all 29 tensors match their digests" in out


def test_json_is_one_object_with_the_parameters_of_the_model(artifact, capsys):
    code, out, _ = run(capsys, artifact, "--json")
    description = json.loads(out)
    assert code == 0
    assert description["parameters"]["total"] == 2 * 11 * 8 + 8 + 2 * (2 * 8 + 192 + 24 + 3 * 2 * 6 * 8)
    assert description["routing"]["ffn"]["inference"] == {"mode": "top_k", "top_k": 2, "threshold": None, "top_p": None}
    assert description["dtypes"] == {"F32": 29}
    assert description["verified"] is None


def test_damage_is_a_mistake_of_the_files_and_named(artifact, capsys):
    [file] = artifact.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, out, err = run(capsys, artifact, "--verify", "--json")
    assert (code, out) == (2, "")
    assert file.name in err and "SHA-256" in err
