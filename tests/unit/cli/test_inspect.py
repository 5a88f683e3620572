"""``dsmoe inspect`` describes an artifact and finds damage."""

import json

import pytest
import torch

from dsmoe_ray.artifact.calibration_record import CalibrationRecord
from dsmoe_ray.artifact.layout import model_shapes
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.recalibrate import update_routing
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
    for text in ("2 layers", "num_experts 3", "top_k=2", "[the run]", "model-00001-of-00001.safetensors"):
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


def test_a_calibration_is_told(artifact, capsys):
    record = CalibrationRecord.model_validate(
        {
            "budget": 0.7,
            "method": "auto",
            "routing": "per_layer_top_k=3,1",
            "deployed_before": "top_k=2",
            "data": "some/text",
            "data_sha256": "0" * 64,
            "seq_len": 4,
            "num_selection_tokens": 1200,
            "num_held_out_tokens": 1100,
            "created_unix_s": 1.0,
            "duration_s": 2.0,
            "frontier": [
                {
                    "routing": spec,
                    "active_ffn_ratio": ratio,
                    "loss": loss,
                    "selection_active_ffn_ratio": ratio,
                    "selection_loss": loss,
                }
                for spec, ratio, loss in (("dense", 1.0, 1.25), ("per_layer_top_k=3,1", 2 / 3, 1.5))
            ],
            "profile": None,
        }
    )
    rule = RoutingConfig.parse(record.routing)
    assert json.loads(run(capsys, artifact, "--json")[1])["calibration"] is None
    update_routing(load_artifact(artifact), ffn=rule, calibration=record)
    assert json.loads(run(capsys, artifact, "--json")[1])["calibration"] == record.model_dump(mode="json")
    _, out, _ = run(capsys, artifact, "--verify")
    for text in ("calibration for a budget of 0.7 on some/text", "loss on 1,100 tokens", "66.7%", "1.5000"):
        assert text in out
    # As deployed, as chosen and on the frontier.
    assert out.count("per_layer_top_k=3,1") == 3


def test_damage_is_a_mistake_of_the_files_and_named(artifact, capsys):
    [file] = artifact.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, out, err = run(capsys, artifact, "--verify", "--json")
    assert (code, out) == (2, "")
    assert file.name in err and "SHA-256" in err
