"""Two ranks that share out the experts against one process that holds them all, with as many threads in total."""

from dsmoe_ray.bench.measure import Measurement, compare_speed
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.worker_side import start_side
from dsmoe_ray.bench.workloads import WORKLOADS, build_run
from dsmoe_ray.errors import BenchUnavailableError

_NUM_SHARDS = 2


def compare_with_one_process(settings: Settings, *, workload: str) -> Measurement:
    """Return the tokens/s of two ranks, tokens travelling between them, over those of one; processes on both sides.

    Raises:
        BenchUnavailableError: the threads cannot be shared out, or the question makes no sense on this device.
    """
    if settings.device != "cpu":
        raise BenchUnavailableError("two ranks with half of the threads each are a question to CPUs; use --device cpu")
    if settings.num_threads % _NUM_SHARDS:
        raise BenchUnavailableError(f"{settings.num_threads} threads cannot be shared out to two; use --threads 2")
    threads = settings.num_threads // _NUM_SHARDS
    shape = WORKLOADS[workload]
    sharded = build_run(shape, ep=_NUM_SHARDS, num_threads=threads)
    alone = build_run(shape, num_threads=settings.num_threads)
    with (
        start_side(sharded, device=settings.device, num_threads=threads) as ours,
        start_side(alone, device=settings.device, num_threads=settings.num_threads) as baseline,
    ):
        return compare_speed(ours, baseline, settings.turns(steps_per_turn=2))
