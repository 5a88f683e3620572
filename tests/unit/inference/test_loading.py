"""From an artifact to a model that runs."""

import pytest
import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.errors import ArtifactError
from dsmoe_ray.inference.loading import load_model
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.tiny_artifact import write_tiny_artifact


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_the_loaded_model_computes_what_the_saved_one_does(tmp_path, tie_embeddings):
    artifact = load_artifact(write_tiny_artifact(tmp_path / "artifact", tie_embeddings=tie_embeddings))
    saved = Transformer(artifact.model_config)
    initialize(saved, artifact.model_config, seed=1)
    loaded = load_model(artifact, device=torch.device("cpu"))
    tokens_BS = torch.arange(30).view(2, 15)
    assert torch.equal(loaded(tokens_BS).logits_BSV, saved(tokens_BS).logits_BSV)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


def test_float32_weights_are_used_where_they_lie(tmp_path):
    artifact = load_artifact(write_tiny_artifact(tmp_path / "artifact"))
    model = load_model(artifact, device=torch.device("cpu"))
    for name, tensor in artifact.load_state_dict().items():
        assert model.get_parameter(name).data_ptr() == tensor.data_ptr()


def test_weights_stored_in_bfloat16_are_computed_with_in_float32_on_a_cpu(tmp_path):
    artifact = load_artifact(write_tiny_artifact(tmp_path / "artifact", dtype=torch.bfloat16))
    model = load_model(artifact, device=torch.device("cpu"))
    for name, tensor in artifact.load_state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(model.get_parameter(name), tensor.float())
    assert model(torch.arange(9)[None]).logits_BSV.isfinite().all()


def test_a_damaged_weight_is_refused_by_name(tmp_path):
    directory = write_tiny_artifact(tmp_path / "artifact")
    path = directory / "model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="does not match its SHA-256"):
        load_model(load_artifact(directory))
