"""The ``debug`` switches of a run, applied to one rank."""

import os
from pathlib import Path

import torch
from torch import profiler

from dsmoe_ray.model.router import Router
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.training.config import DebugConfig


def apply_debug_switches(model: Transformer, config: DebugConfig) -> None:
    """Turn on deterministic kernels and balanced routing where asked for."""
    if config.deterministic:
        # Without it torch refuses every matrix product on a GPU; cuBLAS reads it when first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    for module in model.modules():
        if isinstance(module, Router):
            module.force_balanced = config.force_balanced_routing


class StepProfiler:
    """Records a range of steps as a trace that chrome://tracing and Perfetto open."""

    def __init__(self, config: DebugConfig, run_dir: Path, *, rank: int) -> None:
        self._steps = config.profile_steps
        self._path = run_dir / "profile" / f"rank-{rank}.json"
        self._profiler: profiler.profile | None = None

    def before_step(self, step: int) -> None:
        """Start recording if the step with this index is to be profiled; a resumed run may begin among those."""
        if self._profiler is None and self._steps is not None and self._steps[0] <= step <= self._steps[1]:
            self._profiler = profiler.profile(record_shapes=True)
            self._profiler.start()

    def after_step(self, step: int) -> None:
        """Write the trace if the step with this index was the last to profile."""
        if self._profiler is not None and self._steps is not None and step >= self._steps[1]:
            self._profiler.stop()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._path))
            self._profiler = None
