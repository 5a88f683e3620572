"""Memory at the peak of our step against that of the dense twin's, each in a fresh process."""

from dsmoe_ray.bench.measure import Measurement, Spread
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.worker_side import start_side
from dsmoe_ray.bench.workloads import WORKLOADS, build_run
from dsmoe_ray.model.config import ModelConfig

_WARMUP_STEPS = 2
_WATCHED_STEPS = 2


def compare_with_dense_twin(settings: Settings, *, workload: str) -> Measurement:
    """Return our peak over the twin's, in bytes that came on top of the empty process.

    That counts weights, gradients, optimizer, activations and passing buffers, but not the libraries, which would hide
    a difference. ``above_state`` is what the step alone adds to what is held between steps.
    """
    model = WORKLOADS[workload].model
    repeats = 1 if settings.quick else 3
    ours = [_measure(settings, workload, model) for _ in range(repeats)]
    twin = [_measure(settings, workload, model.dense_twin()) for _ in range(repeats)]
    pairs = list(zip(ours, twin, strict=True))
    above_state = Spread.of([mine["above_state_bytes"] / theirs["above_state_bytes"] for mine, theirs in pairs])
    return Measurement(
        figure=Spread.of([mine["peak_bytes"] / theirs["peak_bytes"] for mine, theirs in pairs]),
        ours=dict(ours[0]),
        baseline=dict(twin[0]),
        details={"ratio_above_state": above_state.median},
    )


def _measure(settings: Settings, workload: str, model: ModelConfig) -> dict[str, int]:
    config = build_run(WORKLOADS[workload], model=model, num_threads=settings.num_threads)
    with start_side(config, device=settings.device, num_threads=settings.num_threads) as side:
        side.run(_WARMUP_STEPS)
        [found] = side.measure_peak(_WATCHED_STEPS)
    return {
        "peak_bytes": found["peak_bytes"] - found["empty_bytes"],
        "above_state_bytes": found["peak_bytes"] - found["before_bytes"],
        "process_peak_bytes": found["peak_bytes"],
    }
