"""A small artifact on disk, and how to forge one that still has the right digests."""

import hashlib
import json

import pytest
import torch

from dsmoe_ray.artifact.layout import model_shapes
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.durable import from_sealed_json, to_sealed_json
from dsmoe_ray.model.config import MoaConfig, ModelConfig, MoeConfig, RouterConfig, RoutingConfig

TOKENIZER = '{"version": "1.0", "added_tokens": [], "text": "\u00e9"}'


@pytest.fixture(scope="session")
def config():
    routing = RoutingConfig(mode="top_k", top_k=3)
    return ModelConfig(
        vocab_size=11,
        d_model=8,
        num_layers=2,
        max_seq_len=4,
        attention=MoaConfig(kind="moa", num_experts=3, num_kv_heads=2, head_dim=4),
        ffn=MoeConfig(kind="moe", num_experts=12, d_ff=6, activation="swiglu", router=RouterConfig(inference=routing)),
    )


@pytest.fixture(scope="session")
def tensors(config):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in model_shapes(config).items()}


@pytest.fixture
def publish(tmp_path, config, tensors):
    def run(directory=tmp_path / "artifact", **changes):
        arguments = {
            "model_config": config,
            "tensors": tensors.items(),
            "tokenizer_json": TOKENIZER,
            "provenance": {"run": "r", "step": 3, "loss": 1.5},
            "eos_token_id": 0,
        }
        save_artifact(directory, **{**arguments, **changes})
        return directory

    return run


@pytest.fixture
def artifact_dir(publish):
    return publish()


@pytest.fixture
def forge():
    """Change what an artifact says, with all digests made to fit: what an attacker can do, and damage cannot."""

    def run(directory, change=None, **side_files):
        path = directory / "manifest.json"
        fields = from_sealed_json(path.read_bytes())
        for stem, content in side_files.items():
            name = {"index": "model.safetensors.index.json"}.get(stem, f"{stem}.json")
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            (directory / name).write_bytes(data)
            fields["side_files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        if change is not None:
            change(fields)
        path.write_bytes(to_sealed_json(fields))

    return run
