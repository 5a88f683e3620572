"""Memory at the peak of loading a model and generating with it, in a process of its own.

Run as a program it is that process: ``python -m dsmoe_ray.bench.engine_memory WORKLOAD ARTIFACT BATCH_SIZE
SMALL_ARTIFACT``; the small model is run first.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.bench.engine_side import build_engine, publish
from dsmoe_ray.bench.engine_workloads import ENGINE_WORKLOADS
from dsmoe_ray.bench.measure import Measurement, Spread
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.worker import read_memory, reset_peak, return_free_memory
from dsmoe_ray.bench.workloads import Dtype
from dsmoe_ray.errors import BenchError
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.requests import GenerationRequest

_TIMEOUT_S = 600


def measure_peak(settings: Settings, *, workload: str, dtype: Dtype, batch_size: str) -> Measurement:
    """Return the peak above the empty process over weights and KV cache, mapped pages of the weights counted."""
    artifact, small = publish(workload, dtype), publish("quickstart", dtype)
    command = [sys.executable, "-m", __name__, workload, str(artifact), batch_size, str(small)]
    repeats = 1 if settings.quick else 3
    found = [_run(command) for _ in range(repeats)]
    ratios = [one["peak_bytes"] / (one["weight_bytes"] + one["kv_cache_bytes"]) for one in found]
    return Measurement(figure=Spread.of(ratios), ours=found[0])


def _run(command: list[str]) -> dict[str, int]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"the measured process took longer than {_TIMEOUT_S} s") from error
    if done.returncode != 0:
        raise BenchError(f"the measured process failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout)


def generate(workload: str, artifact: Path, batch_size: int, small_artifact: Path) -> dict[str, int]:
    """Load an engine, generate one batch, and return what this process held at most above what it held before."""
    cpu = torch.device("cpu")
    # What libraries take at their first use is not the model's.
    _generate_once("quickstart", small_artifact, 1)
    return_free_memory()
    empty_bytes = read_memory(cpu)["now_bytes"]
    reset_peak(cpu)
    kv_cache_bytes = _generate_once(workload, artifact, batch_size)
    peak_bytes = read_memory(cpu)["peak_bytes"] - empty_bytes
    weight_bytes = load_artifact(artifact).size_bytes
    return {"peak_bytes": peak_bytes, "weight_bytes": weight_bytes, "kv_cache_bytes": kv_cache_bytes}


def _generate_once(workload: str, artifact: Path, batch_size: int) -> int:
    shape = ENGINE_WORKLOADS[workload]
    # As a user would run it: prompts go through in pieces of the default size.
    default = EngineConfig.model_fields["max_batched_tokens"].default
    engine = build_engine(shape, artifact, batch_size=batch_size, max_batched_tokens=default)
    for idx, prompt in enumerate(shape.make_prompts(batch_size, seed=0)):
        request = GenerationRequest(prompt_ids=prompt, max_tokens=shape.num_output_tokens, ignore_eos=True)
        engine.add(idx, request)
    while engine.has_work:
        engine.step()
    return engine.status.kv_cache_bytes


if __name__ == "__main__":
    json.dump(generate(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])), sys.stdout)
