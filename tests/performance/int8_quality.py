"""Perplexity of an artifact as the engine computes it with each type of weights, on the windows of a prepared text.

python tests/performance/int8_quality.py runs/x/artifact runs/x/data/held_out [--tokens 16384]
"""

import argparse
import json
import math
from pathlib import Path

import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.evaluation.quality import plan_windows, read_batches
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.loading import load_engine
from dsmoe_ray.inference.requests import GenerationRequest


def compute_loss(artifact, windows, dtype):
    """Return the mean loss of every token of the windows but the first ones, in nats."""
    engine = load_engine(artifact, EngineConfig(dtype=dtype), device=torch.device("cpu"))
    for index, window in enumerate(windows):
        engine.add(index, GenerationRequest(prompt_ids=window, max_tokens=0, prompt_logprobs=0))
    losses = []
    while engine.has_work:
        for output in engine.step():
            losses += [-token.logprob for token in output.prompt_logprobs or ()]
    assert len(losses) == sum(len(window) - 1 for window in windows)
    return math.fsum(losses) / len(losses)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    arguments = parser.parse_args()
    artifact = load_artifact(arguments.artifact)
    shards = TokenShards.open(arguments.data)
    # A window has one token more than it has targets.
    chosen = plan_windows(shards, seq_len=artifact.model_config.max_seq_len - 1, max_tokens=arguments.tokens)
    batches = read_batches(shards, chosen, torch.device("cpu"))
    windows = [window.tolist() for batch in batches for window in batch]
    found = {dtype: compute_loss(artifact, windows, dtype) for dtype in ("float32", "bfloat16", "int8")}
    print(json.dumps({dtype: {"loss": loss, "perplexity": math.exp(loss)} for dtype, loss in found.items()}, indent=2))


if __name__ == "__main__":
    main()
