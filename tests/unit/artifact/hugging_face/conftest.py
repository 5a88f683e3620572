"""Models of all four stock formats on disk, written by ourselves; that they are what they claim is proven elsewhere."""

import json

import pytest
from safetensors.torch import load_file, save_file

from dsmoe_ray.artifact.hugging_face.export import export_model
from dsmoe_ray.artifact.hugging_face.export_plan import plan_export
from dsmoe_ray.artifact.hugging_face.formats import Format
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from tests.fakes.stock_models import draw_weights, make_config, make_tokenizer

CONFIGS = {
    Format.JETMOE: make_config(attention="moa"),
    Format.GRANITEMOE: make_config(),
    Format.MIXTRAL: make_config(),
    Format.QWEN2_MOE: make_config(gates="raw"),
}


@pytest.fixture
def publish(tmp_path):
    """Write an artifact and return its directory."""

    def run(config, **arguments):
        save_artifact(
            tmp_path / "artifact",
            model_config=config,
            tensors=draw_weights(config),
            **({"tokenizer_json": make_tokenizer().to_json(), "provenance": {}, "eos_token_id": 0} | arguments),
        )
        return tmp_path / "artifact"

    return run


@pytest.fixture
def make_stock(tmp_path, publish):
    """Write a model in a stock format and return its directory."""

    def run(kind, *, config=None, max_file_bytes=1 << 30, **arguments):
        artifact = load_artifact(publish(config or CONFIGS[kind], **arguments))
        plan = plan_export(artifact.model_config, kind)
        export_model(artifact, tmp_path / "stock", plan, max_file_bytes=max_file_bytes)
        return tmp_path / "stock"

    return run


@pytest.fixture
def edit_json():
    """Change keys of a JSON file; None as a value removes one."""

    def run(path, **changes):
        fields = json.loads(path.read_text()) if path.exists() else {}
        fields = {name: value for name, value in (fields | changes).items() if value is not None}
        path.write_text(json.dumps(fields))

    return run


@pytest.fixture
def edit_weights():
    """Change the tensors of a model that lies in one file."""

    def run(directory, change):
        path = directory / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return run
