"""Trained models leave in stock formats and come back: the ready-made examples, with fewer steps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.data.tokenizer import parse_tokenizer
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.loading import load_engine, load_model
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.model.layer_routing import deployed_routing
from tests.fakes.other_transformers import VERSIONS, read_outcome, run_jobs
from tests.fakes.transformers_side import NUM_GENERATED, PROMPT_LENGTH

ROOT = Path(__file__).parents[2]
STEPS = 40
TEXT = "def read_lines(path):\n    with open(path) as stream:\n        return stream.readlines()\n\n\nclass Reader:\n"
# Example, gates of its FFN, and the formats that hold it.
MODELS = {
    "jetmoe": ("tiny_jetmoe", "renormalized", ["jetmoe"]),
    "renormalized": ("tiny_ffn_moe", "renormalized", ["mixtral", "granitemoe", "qwen2_moe"]),
    "raw": ("tiny_ffn_moe", "raw", ["qwen2_moe"]),
}


def dsmoe(*arguments: str) -> str:
    command = [sys.executable, "-m", "dsmoe_ray", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=MODELS)
def trained(request, tmp_path_factory):
    """Train a model, write it in every format that holds it, and read it back."""
    example, gates, formats = MODELS[request.param]
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    settings = {"run.dir": run_dir, "train.steps": STEPS, "model.ffn.router.gates": gates}
    dsmoe("train", f"examples/{example}.yaml", *(f"--set={key}={value}" for key, value in settings.items()))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5, "the model learned nothing"
    for name in formats:
        report = json.loads(dsmoe("export", str(run_dir / "artifact"), str(run_dir / name), "--format", name, "--json"))
        assert not report["routing_changes"]
        dsmoe("import", str(run_dir / name), str(run_dir / f"{name}-back"))
    return run_dir, formats


def continue_greedily(model, tokens, end):
    routing, sequence = deployed_routing(model.config), tokens[:1, :PROMPT_LENGTH]
    while sequence.shape[1] < PROMPT_LENGTH + NUM_GENERATED and sequence[0, -1] != end:
        last = model(sequence, routing=routing, last_logits_only=True).logits_BSV[:, -1]
        sequence = torch.cat([sequence, last.argmax(-1, keepdim=True)], dim=1)
    return sequence[0, PROMPT_LENGTH:].tolist()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_trained_model_computes_the_same_under_transformers(trained, tmp_path):
    """Logits to 1e-4 in float32, 64 greedy tokens and text, under both versions, and again after coming back."""
    run_dir, formats = trained
    artifact = load_artifact(run_dir / "artifact")
    tokenizer = parse_tokenizer(artifact.tokenizer_json, source="the artifact")
    tokens = torch.from_numpy(tokenizer.encode(TEXT))[None]
    model = load_model(artifact, dtype="float32")
    logits = model(tokens, routing=deployed_routing(model.config)).logits_BSV
    generated = continue_greedily(model, tokens, artifact.generation_config["eos_token_id"])
    for version in VERSIONS:
        jobs = [
            {
                "do": "load",
                "directory": str(run_dir / name),
                "out": str(tmp_path / f"{version}-{name}"),
                "text": TEXT,
                "tokens": tokens.tolist(),
            }
            for name in formats
        ]
        run_jobs(version, jobs, tmp_path / version)
        for job in jobs:
            outcome = read_outcome(job)
            torch.testing.assert_close(outcome["logits"], logits, rtol=0.0, atol=1e-4)
            assert outcome["generated"].tolist() == generated
            assert (outcome["ids"], outcome["decoded"]) == (tokens[0].tolist(), TEXT)
    for name in formats:
        returned = load_artifact(run_dir / f"{name}-back")
        back = load_model(returned, dtype="float32")
        found = back(tokens, routing=deployed_routing(back.config)).logits_BSV
        torch.testing.assert_close(found, logits, rtol=0.0, atol=1e-4)
        generator = Generator(load_engine(returned, EngineConfig(numerics="exact")))
        request = GenerationRequest(prompt_ids=tokens[0, :PROMPT_LENGTH].tolist(), max_tokens=NUM_GENERATED)
        [outputs] = generator.run([request])
        # The engine keeps the token that ends a text to itself.
        found = [output.token.token_id for output in outputs if output.token is not None]
        assert found == [token for token in generated if token != artifact.generation_config["eos_token_id"]]
