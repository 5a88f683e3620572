"""Our sparse engine against the same engine on the dense twin, and against the machine's own limits."""

from dataclasses import replace

import torch

from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.bench.engine_side import EngineSide, build_engine, build_engine_config, publish
from dsmoe_ray.bench.engine_workloads import ENGINE_WORKLOADS, EngineWorkload
from dsmoe_ray.bench.machine import measure_gemm_gflops
from dsmoe_ray.bench.measure import Measurement, Spread, compare_speed, describe_speed
from dsmoe_ray.bench.roofline import (
    CountingExperts,
    StepCost,
    compute_step_cost,
    find_kept,
    measure_read_bytes_per_s,
)
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.workloads import Dtype
from dsmoe_ray.errors import BenchUnavailableError
from dsmoe_ray.inference.cpu_library import KernelsUnavailableError
from dsmoe_ray.inference.cpu_runner import CpuRunner
from dsmoe_ray.inference.loading import load_model
from dsmoe_ray.model.accounting import compute_forward_flops, mean_causal_context
from dsmoe_ray.model.config import ModelConfig

_WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}


def compare_decode_with_twin(settings: Settings, *, workload: str, dtype: Dtype, batch_size: str) -> Measurement:
    """Return our decode tokens/s over the twin's, as a share of what the roofline of both allows.

    At batch 1 that is the ratio of bytes read. Of a model that fits in a cache the plain ratio is returned.
    """
    shape, batch = ENGINE_WORKLOADS[workload], int(batch_size)
    ours = EngineSide(build_engine(shape, publish(workload, dtype), batch_size=batch), shape, batch_size=batch)
    twin_artifact = publish(workload, dtype, is_twin=True)
    twin = EngineSide(build_engine(shape, twin_artifact, batch_size=batch), shape, batch_size=batch)
    found = compare_speed(ours, twin, settings.turns())
    if shape.fits_in_cache:
        return found
    distinct = _count_distinct_experts(shape, workload, dtype, batch)
    rates = _measure_rates(dtype)
    costs = [
        _step_cost(model, shape, dtype, batch, used)
        for model, used in ((shape.model, distinct), (shape.model.dense_twin(), None))
    ]
    ours_s, twin_s = (cost.time_s(**rates) for cost in costs)
    predicted = costs[1].num_bytes / costs[0].num_bytes if batch == 1 else twin_s / ours_s
    details = {
        "speed_ratio": found.figure.median,
        "predicted_ratio": predicted,
        "distinct_experts": distinct,
        "bytes_per_step": costs[0].num_bytes,
        "read_gb_per_s": rates["bytes_per_s"] / 1e9,
        "gemm_gflops": rates["flops_per_s"] / 1e9,
    }
    return replace(found, figure=found.figure.scaled(1 / predicted), details=details)


def compare_prefill_with_twin(settings: Settings, *, workload: str, dtype: Dtype, batch_size: str) -> Measurement:
    """Return our prefill tokens/s over the twin's, as a share of the ratio of FLOPs; the output head is left out."""
    shape, batch = ENGINE_WORKLOADS[workload], int(batch_size)
    sides = [
        EngineSide(
            build_engine(shape, publish(workload, dtype, is_twin=is_twin), batch_size=batch),
            shape,
            batch_size=batch,
            phase="prefill",
        )
        for is_twin in (False, True)
    ]
    found = compare_speed(sides[0], sides[1], settings.turns())
    ratio = _prefill_flops(shape.model.dense_twin(), shape) / _prefill_flops(shape.model, shape)
    details = {"speed_ratio": found.figure.median, "flops_ratio": ratio}
    return replace(found, figure=found.figure.scaled(1 / ratio), details=details)


def measure_bandwidth_share(settings: Settings, *, workload: str, dtype: Dtype) -> Measurement:
    """Return the share of the rate at which this machine reads memory that decoding at batch 1 reaches."""
    shape = ENGINE_WORKLOADS[workload]
    side = EngineSide(build_engine(shape, publish(workload, dtype), batch_size=1), shape, batch_size=1)
    turns = settings.turns()
    side.run(turns.warmup_steps)
    kept = find_kept(shape.model).ffn
    num_bytes = _step_cost(shape.model, shape, dtype, 1, kept).num_bytes * side.tokens_per_step
    durations_s, shares, rates = [], [], []
    for _ in range(turns.num_pairs):
        durations_s.append(side.run(1))
        rates.append(measure_read_bytes_per_s())
        shares.append(num_bytes / durations_s[-1] / rates[-1])
    return Measurement(
        figure=Spread.of(shares),
        ours=describe_speed(durations_s, side.tokens_per_step),
        details={"read_gb_per_s": Spread.of(rates).median / 1e9, "bytes_per_token": num_bytes / side.tokens_per_step},
    )


def measure_routing_share(settings: Settings, *, workload: str, dtype: Dtype, batch_size: str) -> Measurement:
    """Return the share of a decode step that routers, selection and grouping by expert take."""
    shape, batch = ENGINE_WORKLOADS[workload], int(batch_size)
    runner = _build_cpu_runner(shape, workload, dtype, batch)
    engine = build_engine(shape, publish(workload, dtype), batch_size=batch, runner=runner)
    side = EngineSide(engine, shape, batch_size=batch)
    turns = settings.turns()
    side.run(turns.warmup_steps)
    routing_s = runner.watch_routing()
    side.at_decode_start = lambda: routing_s.fill(0.0)
    shares, durations_s = [], []
    for _ in range(turns.num_pairs):
        durations_s.append(side.run(1))
        shares.append(float(routing_s[0]) / durations_s[-1])
    return Measurement(figure=Spread.of(shares), ours=describe_speed(durations_s, side.tokens_per_step))


def compare_numerics(settings: Settings, *, workload: str, dtype: Dtype, batch_size: str) -> Measurement:
    """Return decode tokens/s with exact numerics over those with fast ones."""
    shape, batch = ENGINE_WORKLOADS[workload], int(batch_size)
    exact, fast = (
        EngineSide(
            build_engine(shape, publish(workload, dtype), batch_size=batch, numerics=numerics), shape, batch_size=batch
        )
        for numerics in ("exact", "fast")
    )
    return compare_speed(exact, fast, settings.turns())


def compare_int8(settings: Settings, *, workload: str, dtype: Dtype, batch_size: str) -> Measurement:
    """Return decode tokens/s with matrices rounded to int8 over those with weights as they are published."""
    shape, batch = ENGINE_WORKLOADS[workload], int(batch_size)
    rounded, published = (
        EngineSide(build_engine(shape, publish(workload, dtype), batch_size=batch, dtype=held), shape, batch_size=batch)
        for held in ("int8", "auto")
    )
    return compare_speed(rounded, published, settings.turns())


def _step_cost(
    model: ModelConfig, shape: EngineWorkload, dtype: Dtype, batch_size: int, distinct: float | None
) -> StepCost:
    context = shape.num_prompt_tokens + shape.num_output_tokens / 2
    return compute_step_cost(
        model,
        batch_size=batch_size,
        context_tokens=context,
        distinct_experts=distinct,
        weight_bytes=_WEIGHT_BYTES[dtype],
    )


def _measure_rates(dtype: Dtype) -> dict[str, float]:
    gflops = measure_gemm_gflops(torch.device("cpu"), getattr(torch, dtype))
    return {"bytes_per_s": measure_read_bytes_per_s(), "flops_per_s": gflops * 1e9}


def _prefill_flops(model: ModelConfig, shape: EngineWorkload) -> float:
    context = mean_causal_context(shape.num_prompt_tokens)
    head = 2.0 * model.vocab_size * model.d_model
    return compute_forward_flops(model, context_tokens=context, kept=find_kept(model)) - head


def _count_distinct_experts(shape: EngineWorkload, workload: str, dtype: Dtype, batch_size: int) -> float:
    if batch_size == 1:
        kept = find_kept(shape.model).ffn
        assert kept is not None
        return kept
    runner = _build_cpu_runner(shape, workload, dtype, batch_size)
    counting = CountingExperts(runner.experts, batch_size=batch_size)
    runner.experts = counting
    engine = build_engine(shape, publish(workload, dtype), batch_size=batch_size, runner=runner)
    EngineSide(engine, shape, batch_size=batch_size).run(1)
    return counting.mean_distinct


def _build_cpu_runner(shape: EngineWorkload, workload: str, dtype: Dtype, batch_size: int) -> CpuRunner:
    config = build_engine_config(shape, batch_size)
    assert config.num_blocks is not None
    model = load_model(load_artifact(publish(workload, dtype)), device=torch.device("cpu"))
    try:
        return CpuRunner(
            model, num_blocks=config.num_blocks, max_tokens=config.max_batched_tokens, max_seqs=config.max_num_seqs
        )
    except KernelsUnavailableError as error:
        raise BenchUnavailableError(str(error)) from error
