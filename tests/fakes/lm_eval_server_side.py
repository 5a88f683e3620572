"""lm-evaluation-harness on one artifact: by its own client of a running server, and on our engine in this process."""

import json
import sys
from pathlib import Path

import torch
from lm_eval.models.openai_completions import LocalCompletionsAPI

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.evaluation.lm_eval_adapter import EngineModel
from dsmoe_ray.inference.generation import Generator
from dsmoe_ray.inference.loading import load_engine
from tests.fakes.lm_eval_tasks_run import evaluate


def main(artifact_path, url, out):
    torch.set_num_threads(1)
    offline = EngineModel(Generator(load_engine(load_artifact(Path(artifact_path)))))
    longest = offline.max_length + 1
    # The client keeps one position more for itself when it cuts long texts into windows.
    offline.max_length -= 1
    settings = {"model": "tiny", "base_url": f"{url}/v1/completions", "max_length": longest}
    sides = {
        "offline": offline,
        "one at a time": LocalCompletionsAPI(**settings),
        "many at once": LocalCompletionsAPI(**settings, num_concurrent=4, batch_size=3),
    }
    assert sides["one at a time"].tokenizer_backend == "remote"
    Path(out).write_text(json.dumps({name: evaluate(model) for name, model in sides.items()}, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
