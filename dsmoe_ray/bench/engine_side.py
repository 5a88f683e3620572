"""Our inference engine as a side of a comparison, on models with random weights that are published for the bench."""

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from dsmoe_ray.artifact.hugging_face.export import export_model
from dsmoe_ray.artifact.hugging_face.export_plan import plan_export
from dsmoe_ray.artifact.hugging_face.formats import Format
from dsmoe_ray.artifact.layout import model_shapes
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.bench.engine_workloads import ENGINE_WORKLOADS, EngineWorkload
from dsmoe_ray.bench.workloads import Dtype
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.data.tokenizer import parse_tokenizer, train_tokenizer
from dsmoe_ray.errors import BenchError
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.loading import build_runner, load_model
from dsmoe_ray.inference.requests import GenerationRequest
from dsmoe_ray.inference.runner import ModelRunner
from dsmoe_ray.model.init import draw_initial

Phase = Literal["prefill", "decode"]
_BLOCK_SIZE = 16
_LEAST_BATCHED_TOKENS = 512


class EngineSide:
    """One phase of greedy generation, batch by batch; each step has prompts of its own."""

    def __init__(self, engine: Engine, workload: EngineWorkload, *, batch_size: int, phase: Phase = "decode") -> None:
        self.engine = engine
        self._workload, self._batch_size, self._phase = workload, batch_size, phase
        tokens_per_sequence = workload.num_prompt_tokens if phase == "prefill" else workload.num_output_tokens - 1
        self.tokens_per_step = batch_size * tokens_per_sequence
        self.generations: list[list[list[int]]] = []
        """Output tokens of every step so far; the seed of a step's prompts is its index."""
        self.at_decode_start: Callable[[], object] = lambda: None
        """Called whenever all sequences of a batch have their first token."""

    def run(self, num_steps: int) -> float:
        """Generate this many batches and return the seconds of the phase that counts."""
        return sum(self._generate()[self._phase] for _ in range(num_steps))

    def _generate(self) -> dict[Phase, float]:
        prompts = self._workload.make_prompts(self._batch_size, seed=len(self.generations))
        num_tokens = self._workload.num_output_tokens if self._phase == "decode" else 1
        tokens: list[list[int]] = [[] for _ in prompts]
        start_s = monotonic_s()
        for idx, prompt in enumerate(prompts):
            self.engine.add(idx, GenerationRequest(prompt_ids=prompt, max_tokens=num_tokens, ignore_eos=True))
        while not all(tokens):
            self._step(tokens)
        if any(len(own) != 1 for own in tokens):
            raise BenchError("prompts were read in several steps, so that some sequences decoded before others")
        self.at_decode_start()
        first_s = monotonic_s()
        while self.engine.has_work:
            self._step(tokens)
        self.generations.append(tokens)
        return {"prefill": first_s - start_s, "decode": monotonic_s() - first_s}

    def _step(self, tokens: list[list[int]]) -> None:
        for output in self.engine.step():
            assert output.token is not None and isinstance(output.request_id, int), output
            tokens[output.request_id].append(output.token.token_id)


def build_engine(
    workload: EngineWorkload, artifact: Path, *, batch_size: int, runner: ModelRunner | None = None, **options: Any
) -> Engine:
    """Return an engine with room for just this batch. Prompts are random, so no prefix is looked for."""
    config = build_engine_config(workload, batch_size, **options)
    published = load_artifact(artifact)
    tokenizer = parse_tokenizer(
        published.tokenizer_json, source="the bench's tokenizer", vocab_size=published.model_config.vocab_size
    )
    if runner is None:
        model = load_model(published, device=torch.device("cpu"))
        runner = build_runner(model, config, release_pages=published.release_pages)
    return Engine(runner, tokenizer, config)


def build_engine_config(workload: EngineWorkload, batch_size: int, **options: Any) -> EngineConfig:
    """Return the configuration that a batch needs.

    All prompts are read in one step, so that all sequences decode together from the first token to the last, as those
    of other engines do.
    """
    return EngineConfig.model_validate(
        {
            "max_num_seqs": batch_size,
            "max_batched_tokens": max(_LEAST_BATCHED_TOKENS, batch_size * workload.num_prompt_tokens),
            "num_blocks": batch_size * -(-workload.num_positions // _BLOCK_SIZE),
            "prefix_cache": False,
            **options,
        }
    )


@functools.cache
def publish(name: str, dtype: Dtype, *, is_twin: bool = False) -> Path:
    """Publish a workload's model, or its dense twin, with random weights; kept until the bench ends."""
    model = ENGINE_WORKLOADS[name].model
    config = model.dense_twin() if is_twin else model
    directory = _scratch() / f"{name}-{dtype}{'-twin' if is_twin else ''}"
    tokenizer = train_tokenizer(["bench"], vocab_size=config.vocab_size)
    save_artifact(
        directory,
        model_config=config,
        tensors=(
            (name, draw_initial(name, torch.Size(shape), config, seed=0))
            for name, shape in model_shapes(config).items()
        ),
        tokenizer_json=tokenizer.to_json(),
        provenance={"run": "bench", "weights": "random"},
        eos_token_id=tokenizer.end_of_text_id,
        dtype=getattr(torch, dtype),
    )
    return directory


@functools.cache
def publish_for_peers(name: str) -> Path:
    """Return a workload's float32 model in the GraniteMoe format, which other engines load."""
    artifact = load_artifact(publish(name, "float32"))
    directory = _scratch() / f"{name}-granitemoe"
    export_model(artifact, directory, plan_export(artifact.model_config, Format.GRANITEMOE))
    return directory


@functools.cache
def _scratch_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="dsmoe-bench-")


def _scratch() -> Path:
    return Path(_scratch_directory().name)
