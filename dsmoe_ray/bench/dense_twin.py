"""Our dense-training step against the dense transformer of equal shape: the price of being a mixture."""

from dataclasses import replace

import torch

from dsmoe_ray.bench.machine import measure_gemm_gflops
from dsmoe_ray.bench.measure import Measurement, compare_speed
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.sides import build_alone
from dsmoe_ray.bench.workloads import WORKLOADS, Dtype, build_run
from dsmoe_ray.model.accounting import compute_training_flops


def compare_with_dense_twin(settings: Settings, *, workload: str, dtype: Dtype) -> Measurement:
    """Return our tokens/s over the twin's; same trainer, same trunk, same process, turn by turn."""
    shape = WORKLOADS[workload]
    ours = build_alone(build_run(shape, dtype=dtype), device=settings.device)
    twin = build_alone(build_run(shape, model=shape.model.dense_twin(), dtype=dtype), device=settings.device)
    found = compare_speed(ours, twin, settings.turns(steps_per_turn=2))
    gemm_gflops = measure_gemm_gflops(torch.device(settings.device), getattr(torch, dtype))
    flops_per_token = compute_training_flops(shape.model, seq_len=shape.seq_len)
    gflops = found.ours["best_tokens_per_s"] * flops_per_token / 1e9
    return replace(
        found,
        details={
            "dtype": dtype,
            "gflops_reached": gflops,
            "gemm_gflops": gemm_gflops,
            "share_of_gemm_rate": gflops / gemm_gflops,
        },
    )
