"""An artifact answers on a GPU as on the CPU. Run it with ``bash tests/gpu.sh``."""

import pytest
import torch

pytest.importorskip("tokenizers", reason="the engine reads text with tokenizers")

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.loading import build_runner, load_model
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.routing import resolve_routing
from tests.fakes.tiny_artifact import make_config, make_tokenizer, write_tiny_artifact

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SETTINGS = ["dense", "top_k=2", "threshold=1.0", "threshold_top_k=1.0", "top_p=0.6"]
PROMPT = [5, 17, 80, 3, 211, 40, 9, 77]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return load_artifact(write_tiny_artifact(tmp_path_factory.mktemp("published") / "artifact"))


def generate(model, routing):
    config = EngineConfig(max_num_seqs=1, numerics="fast")
    engine = Engine(build_runner(model, config), make_tokenizer(make_config()), config)
    request = GenerationRequest(
        prompt_ids=PROMPT, max_tokens=20, routing=resolve_routing(routing, model.config), ignore_eos=True
    )
    [outputs] = Generator(engine).run([request])
    return [output.token.token_id for output in outputs if output.token is not None]


@pytest.mark.parametrize("routing", SETTINGS)
def test_the_most_likely_tokens_on_a_gpu_are_those_on_the_cpu_in_float32(artifact, routing):
    # On a GPU a model is loaded in bfloat16 by itself; moved there it stays in float32.
    on_gpu = load_model(artifact, device=CPU).to(GPU)
    assert on_gpu.compute_dtype == torch.float32
    expected = generate(load_model(artifact, device=CPU), routing)
    assert len(expected) > 10
    assert generate(on_gpu, routing) == expected


def test_logits_of_a_model_loaded_to_a_gpu_are_the_cpus_up_to_bfloat16_rounding(artifact):
    tokens_BS = torch.tensor([PROMPT])
    expected = load_model(artifact, device=CPU)(tokens_BS).logits_BSV
    model = load_model(artifact, device=GPU)
    found = model(tokens_BS.to(GPU)).logits_BSV
    assert found.dtype == torch.float32 and found.device.type == "cuda"
    # Two layers of 8-bit roundings (4e-3 each) on top of each other.
    assert (found.cpu() - expected).abs().max() < 3e-2 * expected.abs().max()


def test_a_model_in_bfloat16_on_a_gpu_generates_with_its_cache(artifact):
    model = load_model(artifact, device=GPU)
    assert len(generate(model, "top_k=2")) > 10
