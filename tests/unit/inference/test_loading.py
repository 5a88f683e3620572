"""From an artifact to a model that runs."""

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.errors import ArtifactError, ConfigError
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.loading import build_runner, load_engine, load_model, load_model_to_measure
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.torch_runner import TorchRunner
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.runner_kinds import make_experts, make_model
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


def test_weights_stored_in_bfloat16_are_computed_with_as_they_are_on_a_cpu(tmp_path):
    artifact = load_artifact(write_tiny_artifact(tmp_path / "artifact", dtype=torch.bfloat16))
    model = load_model(artifact, device=torch.device("cpu"))
    for name, tensor in artifact.load_state_dict().items():
        assert tensor.dtype == torch.bfloat16
        found = model.get_parameter(name)
        # Norms and routers are read in float32 in every model.
        wanted = torch.float32 if name.endswith(("norm.weight", "router.proj.weight")) else torch.bfloat16
        assert found.dtype == wanted
        assert torch.equal(found, tensor.to(wanted))
    assert model.compute_dtype == torch.bfloat16
    assert model(torch.arange(9)[None]).logits_BSV.isfinite().all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32], ids=str)
def test_quality_is_measured_in_float32_on_a_cpu(tmp_path, monkeypatch, stored):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    artifact = load_artifact(write_tiny_artifact(tmp_path / "artifact", dtype=stored))
    model = load_model_to_measure(artifact)
    assert model.compute_dtype == torch.float32
    for name, tensor in artifact.load_state_dict().items():
        assert model.get_parameter(name).dtype == torch.float32
        assert torch.equal(model.get_parameter(name), tensor.float())


def test_without_kernels_everything_runs_in_pytorch_and_a_warning_says_why(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DSMOE_CPU_KERNELS", "off")
    model = load_model(load_artifact(write_tiny_artifact(tmp_path / "artifact")), device=torch.device("cpu"))
    assert isinstance(build_runner(model, EngineConfig()), TorchRunner)
    [record] = caplog.records
    assert record.levelname == "WARNING" and "DSMOE_CPU_KERNELS=off" in record.getMessage()


def test_a_compiler_that_fails_leaves_everything_to_pytorch(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = load_model(load_artifact(write_tiny_artifact(tmp_path / "artifact")), device=torch.device("cpu"))
    assert isinstance(build_runner(model, EngineConfig()), TorchRunner)
    assert "false failed on the CPU kernels" in caplog.text


def test_a_type_that_a_cpu_does_not_compute_in_is_refused_with_those_it_does():
    model = make_model(dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"torch\.float16: .*torch\.float32 or torch\.bfloat16"):
        build_runner(model, EngineConfig())


def test_int8_generates_nearly_what_float32_does(tmp_path):
    artifact = load_artifact(write_tiny_artifact(tmp_path / "artifact"))
    logprobs = []
    for dtype in ("float32", "int8"):
        engine = load_engine(artifact, EngineConfig(dtype=dtype), device=torch.device("cpu"))
        engine.add(0, GenerationRequest(prompt_ids=list(range(5, 25)), max_tokens=1, prompt_logprobs=0))
        [output] = engine.step()
        logprobs.append(torch.tensor([one.logprob for one in output.prompt_logprobs]))
    # Rounding changes each product by about 1%: a few percent of what tells tokens apart.
    whole, rounded = logprobs
    assert 0 < (rounded - whole).norm() < 0.1 * (whole - whole.mean()).norm()


def test_int8_needs_the_kernels_and_the_experts_here(tmp_path, monkeypatch):
    model = load_model(load_artifact(write_tiny_artifact(tmp_path / "artifact")), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="dtype=int8 computes experts in the process"):
        build_runner(model, EngineConfig(dtype="int8"), experts=object())
    monkeypatch.setenv("DSMOE_CPU_KERNELS", "off")
    with pytest.raises(ConfigError, match=r"dtype=int8 needs the compiled CPU kernels: .*DSMOE_CPU_KERNELS=off"):
        build_runner(model, EngineConfig(dtype="int8"))


def test_a_damaged_weight_is_refused_by_name(tmp_path):
    directory = write_tiny_artifact(tmp_path / "artifact")
    path = directory / "model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="does not match its SHA-256"):
        load_model(load_artifact(directory))


def damage_experts(directory):
    """Change a byte of every FFN expert's first matrix."""
    artifact = load_artifact(directory)
    num_layers, num_experts = artifact.model_config.num_layers, artifact.model_config.ffn.num_experts
    path = directory / "model-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    for layer, expert_id in itertools.product(range(num_layers), range(num_experts)):
        start, _ = header[f"blocks.{layer}.ffn.experts.w1.{expert_id:05d}"]["data_offsets"]
        data[8 + header_bytes + start] ^= 1
    path.write_bytes(data)


def test_a_trunk_without_experts_reads_and_verifies_none_of_them(tmp_path):
    directory = write_tiny_artifact(tmp_path / "artifact")
    expected = load_model(load_artifact(directory), device=torch.device("cpu")).state_dict()
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    damage_experts(directory)
    trunk = load_model(load_artifact(directory), device=torch.device("cpu"), with_experts=False)
    for name, parameter in trunk.named_parameters():
        if ".ffn.experts." in name:
            assert parameter.device.type == "meta"
        else:
            assert torch.equal(parameter, expected[name])
    with pytest.raises(ArtifactError, match=r"blocks\.0\.ffn\.experts\.w1\.00000 does not match"):
        load_model(load_artifact(directory), device=torch.device("cpu"))


def test_an_engine_with_experts_elsewhere_generates_what_one_with_all_weights_does(tmp_path):
    artifact = load_artifact(write_tiny_artifact(tmp_path / "artifact"))
    prompt = [5, 6, 7]
    expected = generate(load_engine(artifact), prompt)
    model = load_model(artifact, device=torch.device("cpu"))
    elsewhere = make_experts("cpu native", model)
    assert generate(load_engine(artifact, experts=elsewhere), prompt) == expected


def test_a_model_with_a_dense_ffn_has_no_experts_to_be_elsewhere(tmp_path):
    ffn = {"kind": "dense", "d_ff": 8}
    artifact = load_artifact(write_tiny_artifact(tmp_path / "artifact", ffn=ffn))
    with pytest.raises(ConfigError, match=r"dense FFN.*hosts\.count: 0"):
        load_model(artifact, with_experts=False)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux to tell what is in memory")
def test_experts_that_no_token_selects_stay_on_disk(tmp_path):
    # Experts of 128 KiB a matrix, 24 MiB in all, and one of 64 for each token.
    router = {"kind": "linear", "inference": {"mode": "top_k", "top_k": 1}}
    ffn = {"kind": "moe", "num_experts": 64, "d_ff": 128, "activation": "swiglu", "router": router}
    directory = write_tiny_artifact(tmp_path / "large", d_model=256, num_layers=1, ffn=ffn)
    engine = load_engine(load_artifact(directory), EngineConfig(max_num_seqs=1), device=torch.device("cpu"))
    size_bytes = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    request = GenerationRequest(prompt_ids=[7], max_tokens=2, ignore_eos=True)
    assert len(Generator(engine).run([request])[0]) == 2
    # The rest of the model, a few experts, and what the system reads around them.
    assert 0 < resident_bytes(directory) < size_bytes / 2


def resident_bytes(directory):
    """Return how much of the files in a directory this process has in its memory."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_ours = str(directory) in line
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_the_engine_ends_texts_where_the_defaults_for_generation_say(tmp_path):
    directory = write_tiny_artifact(tmp_path / "artifact")
    prompt = [5, 6, 7]
    everything = generate(load_engine(load_artifact(directory)), prompt, ignore_eos=True)
    # The tokens that the model comes to, in the order of their first use: each may be the one that ends a text.
    for end in list(dict.fromkeys(everything))[:3]:
        saved = load_artifact(directory)
        other = tmp_path / f"ends-with-{end}"
        save_artifact(
            other,
            model_config=saved.model_config,
            tensors=saved.load_state_dict().items(),
            tokenizer_json=saved.tokenizer_json,
            provenance={},
            generation_config={"eos_token_id": [299, end]},
        )
        assert generate(load_engine(load_artifact(other)), prompt) == everything[: everything.index(end)]


def generate(engine, prompt, **options):
    [outputs] = Generator(engine).run([GenerationRequest(prompt_ids=prompt, max_tokens=16, **options)])
    return [output.token.token_id for output in outputs if output.token is not None]
