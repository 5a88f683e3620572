"""What was published comes back bit for bit, whole or in parts, and nothing half-written is ever seen."""

import json

import pytest
import torch
from safetensors import safe_open

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.errors import ArtifactError
from dsmoe_ray.model.config import GqaConfig, ModelConfig
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.training.config import TrainedModelConfig
from tests.unit.artifact.conftest import TOKENIZER


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_state_dict_comes_back_bit_for_bit(publish, tensors, dtype):
    artifact = load_artifact(publish(dtype=dtype))
    state = artifact.load_state_dict()
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state[name].dtype == dtype
        assert torch.equal(state[name], tensor.to(dtype)), name


def test_the_state_dict_fits_the_model_and_converts(artifact_dir, config, tensors):
    model = Transformer(config)
    model.load_state_dict(load_artifact(artifact_dir).load_state_dict())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name])
    converted = load_artifact(artifact_dir).load_state_dict(torch.bfloat16)
    assert {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}


def test_side_files_and_provenance_come_back(artifact_dir, config):
    artifact = load_artifact(artifact_dir)
    assert artifact.model_config == config
    assert artifact.tokenizer_json == TOKENIZER
    assert artifact.generation_config == {"max_length": 4, "eos_token_id": 0}
    assert artifact.manifest.provenance == {"run": "r", "step": 3, "loss": 1.5}
    assert artifact.manifest.routing["ffn"]["inference"]["top_k"] == 3


def test_a_chat_template_and_more_defaults_come_back_too(publish):
    template = "{% for m in messages %}{{ m.content }}\u00e9\n{% endfor %}"
    artifact = load_artifact(publish(chat_template=template, generation_config={"top_p": 0.9, "eos_token_id": [3, 4]}))
    assert artifact.chat_template == template
    assert artifact.generation_config == {"max_length": 4, "top_p": 0.9, "eos_token_id": [3, 4]}
    assert artifact.eos_token_ids == [3, 4]


def test_an_artifact_from_before_there_were_templates_has_none(artifact_dir):
    assert not (artifact_dir / "chat_template.jinja").exists()
    artifact = load_artifact(artifact_dir)
    assert artifact.chat_template is None and artifact.eos_token_ids == [0]


def test_a_changed_chat_template_is_refused(publish):
    directory = publish(chat_template="{{ messages }}")
    (directory / "chat_template.jinja").write_text("{{ massages }}")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja does not match its SHA-256 digest"):
        load_artifact(directory)


@pytest.mark.parametrize("token", [11, -1, "x", True, [0, 11]])
def test_an_end_of_text_that_is_no_token_of_the_model_is_refused(publish, token):
    artifact = load_artifact(publish(generation_config={"eos_token_id": token}))
    with pytest.raises(ArtifactError, match="is no token id below vocab_size=11"):
        _ = artifact.eos_token_ids


def test_one_parameter_can_be_read_by_its_name(artifact_dir, tensors):
    artifact = load_artifact(artifact_dir)
    for name, tensor in tensors.items():
        assert torch.equal(artifact.load_parameter(name), tensor), name
    with pytest.raises(KeyError):
        artifact.load_parameter("blocks.9.attention.wq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_of_a_layer_lie_side_by_side_so_that_the_wide_matrix_is_a_view(publish, tensors, dtype):
    artifact = load_artifact(publish(dtype=dtype))
    for layer in (0, 1):
        experts = artifact.load_experts(layer, range(12))
        wide = {}
        for matrix in ("w1", "w2", "w3"):
            stacked = artifact.load_parameter(f"blocks.{layer}.ffn.experts.{matrix}")
            wide[matrix] = tensor = stacked.view(12 * 6, 8)
            assert torch.equal(tensor, tensors[f"blocks.{layer}.ffn.experts.{matrix}"].flatten(0, 1).to(dtype))
            for expert_id, parts in experts.items():
                offset = parts[matrix].data_ptr() - tensor.data_ptr()
                assert offset == expert_id * 6 * 8 * dtype.itemsize
        # Views of one mapping: the state dict is no copy either.
        state = artifact.load_state_dict()
        assert state[f"blocks.{layer}.ffn.experts.w1"].data_ptr() == wide["w1"].data_ptr()


def test_only_the_experts_asked_for_are_read(artifact_dir, config, tensors):
    layer, spoiled, asked = 1, 5, (3, 11)
    name = f"blocks.{layer}.ffn.experts.w2.{spoiled:05d}"
    [file] = artifact_dir.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    position = data.index(tensors[f"blocks.{layer}.ffn.experts.w2"][spoiled].numpy().tobytes())
    data[position] ^= 1
    file.write_bytes(data)
    artifact = load_artifact(artifact_dir)
    experts = artifact.load_experts(layer, asked)
    for expert_id in asked:
        for matrix in ("w1", "w2", "w3"):
            expected = tensors[f"blocks.{layer}.ffn.experts.{matrix}"][expert_id]
            assert torch.equal(experts[expert_id][matrix], expected)
    for use in (
        lambda: artifact.load_experts(layer, [spoiled]),
        lambda: artifact.load_parameter(f"blocks.{layer}.ffn.experts.w2"),
        artifact.load_state_dict,
        artifact.verify,
    ):
        with pytest.raises(ArtifactError, match=name):
            use()


def test_impossible_experts_and_layers_are_refused(artifact_dir):
    artifact = load_artifact(artifact_dir)
    with pytest.raises(ValueError, match=r"\[0, 12\); got \[12\]"):
        artifact.load_experts(0, [0, 12])
    with pytest.raises(ValueError, match="layer must be in"):
        artifact.load_experts(2, [0])


def test_writing_to_a_loaded_tensor_leaves_the_file_alone(artifact_dir):
    load_artifact(artifact_dir).load_state_dict()["norm.weight"].fill_(7)
    load_artifact(artifact_dir).verify()


def test_a_dense_model_has_no_experts_to_load(publish, config, tensors):
    dense = config.dense_twin()
    wide = {
        name.replace(".experts", ""): tensor.flatten(0, 1) if ".ffn.experts" in name else tensor
        for name, tensor in tensors.items()
        if "router" not in name
    }
    wide = {name: t.flatten(0, 1) if t.dim() == 3 else t for name, t in wide.items()}
    assert isinstance(dense.attention, GqaConfig)
    artifact = load_artifact(publish(model_config=dense, tensors=wide.items()))
    Transformer(dense).load_state_dict(artifact.load_state_dict())
    with pytest.raises(ValueError, match="dense FFN"):
        artifact.load_experts(0, [0])


def test_files_are_cut_at_the_size_asked_for_and_the_index_says_where_things_are(publish, tensors):
    directory = publish(max_file_bytes=8000)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    artifact = load_artifact(directory)
    for name, tensor in artifact.load_state_dict().items():
        assert torch.equal(tensor, tensors[name])
        assert torch.equal(load_artifact(directory).load_parameter(name), tensors[name])
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in weight_map.items():
        stacked, _, expert_id = name.rpartition(".")
        expected = tensors[stacked][int(expert_id)] if expert_id.isdigit() else tensors[name]
        with safe_open(directory / file, framework="pt") as stream:
            assert torch.equal(stream.get_tensor(name), expected)


def test_config_holds_the_model_and_no_key_of_its_training(publish, config):
    trained = TrainedModelConfig(**config.model_dump(), init_from="elsewhere")
    fields = json.loads((publish(model_config=trained) / "config.json").read_text())
    assert fields.keys() == set(ModelConfig.model_fields)


def test_an_artifact_from_before_there_were_tables_of_layers_is_still_read(artifact_dir, config):
    """Its config and manifest name no ``per_layer_top_k``; the digest is the one that was written then."""
    fields = json.loads((artifact_dir / "config.json").read_text())
    rules = [fields[part]["router"]["inference"] for part in ("attention", "ffn")]
    assert [list(rule) for rule in rules] == [["mode", "top_k", "threshold", "top_p"]] * 2
    manifest = load_artifact(artifact_dir).manifest
    assert manifest.routing["ffn"]["inference"] == rules[1]
    assert manifest.config_sha256 == "06f8d72bb20be4dcfc2d0185fd34c61979c7226b1bc80f92e1318bb7c4419e50"


def test_a_table_of_layers_comes_back(publish, config):
    values = config.model_dump()
    values["ffn"]["router"]["inference"] = {"mode": "per_layer_top_k", "per_layer_top_k": [3, 12]}
    deployed = ModelConfig.model_validate(values)
    artifact = load_artifact(publish(model_config=deployed))
    assert artifact.model_config == deployed
    assert artifact.manifest.routing["ffn"]["inference"]["per_layer_top_k"] == [3, 12]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_new_artifact_takes_the_place_of_the_old_one(publish, tensors):
    directory = publish(max_file_bytes=8000)
    publish(tensors=[(name, tensor + 1) for name, tensor in tensors.items()])
    state = load_artifact(directory).load_state_dict()
    assert torch.equal(state["norm.weight"], tensors["norm.weight"] + 1)
    assert names(directory.parent) == ["artifact"]
    assert len(list(directory.glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors[:-1], "was not given"),
        (lambda tensors: [*tensors, ("strange", torch.ones(1))], "strange is not a parameter"),
        (lambda tensors: [*tensors, tensors[0]], "given twice"),
        (lambda tensors: [(tensors[0][0], torch.ones(2, 2)), *tensors[1:]], "has shape"),
        (lambda tensors: [(name, tensor.double()) for name, tensor in tensors], "is torch.float64"),
    ],
    ids=["missing", "strange", "twice", "shape", "type"],
)
def test_a_failed_publication_leaves_the_old_artifact_and_no_trace(publish, tensors, spoil, message):
    directory = publish()
    with pytest.raises(ArtifactError, match=message):
        publish(tensors=iter(spoil(list(tensors.items()))))
    load_artifact(directory).verify()
    assert names(directory.parent) == ["artifact"]


def test_what_a_killed_publication_left_is_put_right_by_the_next(publish, tensors):
    directory = publish()
    directory.rename(directory.with_name(".replaced-artifact"))
    directory.with_name(".staging-artifact").mkdir()
    with pytest.raises(ArtifactError):
        publish(tensors=[])
    load_artifact(directory).verify()
    assert names(directory.parent) == ["artifact"]
