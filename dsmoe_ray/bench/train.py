"""``dsmoe bench train``: every comparison of the training step, its bar, and one row for each."""

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsmoe_ray.bench.measure import Bar, Measurement, Row
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import BenchError, BenchUnavailableError, ConfigError, ExchangeError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row to be measured. Its module is imported only then, as it may need a package that is not there."""

    name: str
    what: str
    unit: str = "ratio of tokens/s"
    bar: Bar
    module: str
    function: str
    options: tuple[tuple[str, str], ...] = ()


_TWIN = "dense-training step over the dense transformer of equal shape, one process"
_PEER = "dense-training step over the whole step of transformers'"
_AT_LEAST_TWIN = Bar("at_least", 0.95)

COMPARISONS = (
    *(
        Comparison(
            name=f"dense_twin_{workload}_{dtype}",
            what=f"{_TWIN}, {workload} shape, {dtype}",
            bar=_AT_LEAST_TWIN,
            module="dense_twin",
            function="compare_with_dense_twin",
            options=(("workload", workload), ("dtype", dtype)),
        )
        for workload in ("quickstart", "large")
        for dtype in ("float32", "bfloat16")
    ),
    *(
        Comparison(
            name=f"peer_{peer}",
            what=f"{_PEER} {title}, same shape, k = N, float32",
            bar=Bar("at_least", 2.0),
            module="peers",
            function="compare_with_peer",
            options=(("peer", peer), ("dtype", "float32")),
        )
        for peer, title in (("granitemoe", "GraniteMoe"), ("jetmoe", "JetMoe"))
    ),
    Comparison(
        name="two_shards",
        what="ep = 2 on two processes of one thread over one process of two threads, quickstart shape",
        bar=Bar("at_least", 0.85),
        module="two_shards",
        function="compare_with_one_process",
        options=(("workload", "quickstart"),),
    ),
    Comparison(
        name="memory",
        what="peak memory of a step over the dense twin's, large shape",
        unit="ratio of bytes",
        bar=Bar("at_most", 1.1),
        module="memory",
        function="compare_with_dense_twin",
        options=(("workload", "large"),),
    ),
    Comparison(
        name="coordinator",
        what="through Ray with metrics and asynchronous checkpoints over the bare step loop, two shards",
        bar=Bar("at_least", 0.97),
        module="ray_runs",
        function="compare_with_bare_loop",
    ),
    Comparison(
        name="start",
        what="from asking for a run to its first step, Ray up and data prepared",
        unit="seconds",
        bar=Bar("at_most", 8.0),
        module="ray_runs",
        function="measure_start",
    ),
    Comparison(
        name="recovery",
        what="from killing a shard to the next step",
        unit="seconds",
        bar=Bar("at_most", 6.0),
        module="ray_runs",
        function="measure_recovery",
    ),
)

GPU_COMPARISON = Comparison(
    name="dense_twin_gpu_bfloat16",
    what=f"{_TWIN}, gpu shape, bfloat16",
    bar=_AT_LEAST_TWIN,
    module="dense_twin",
    function="compare_with_dense_twin",
    options=(("workload", "gpu"), ("dtype", "bfloat16")),
)
"""In place of the CPU shapes, which leave a GPU idle."""


def choose_comparisons(names: Sequence[str], settings: Settings) -> list[Comparison]:
    """Return the comparisons with these names, or whose names begin so; by default all that suit the device.

    Raises:
        ConfigError: a name fits none.
    """
    offered = [*COMPARISONS, GPU_COMPARISON]
    if not names:
        if settings.device == "cpu":
            return list(COMPARISONS)
        return [GPU_COMPARISON, *(c for c in COMPARISONS if c.module != "dense_twin")]
    for name in names:
        if not any(comparison.name.startswith(name) for comparison in offered):
            known = ", ".join(comparison.name for comparison in offered)
            raise ConfigError(f"--only {name}: there is no such comparison. There are: {known}.")
    return [comparison for comparison in offered if comparison.name.startswith(tuple(names))]


def measure_all(comparisons: Sequence[Comparison], settings: Settings) -> Iterator[Row]:
    """Measure one comparison after another; one that fails or cannot be made is a row that says so."""
    for comparison in comparisons:
        load_average = os.getloadavg()[0]
        start_s = monotonic_s()
        status, reason, measurement = _measure(comparison, settings)
        yield Row(
            name=comparison.name,
            what=comparison.what,
            unit=comparison.unit,
            bar=comparison.bar,
            status=status,
            reason=reason,
            measurement=measurement,
            duration_s=monotonic_s() - start_s,
            load_average=load_average,
        )


def _measure(comparison: Comparison, settings: Settings) -> tuple[Any, str | None, Measurement | None]:
    try:
        module = importlib.import_module(f"dsmoe_ray.bench.{comparison.module}")
    except ModuleNotFoundError as error:
        return "skipped", f"the package {error.name} is not installed", None
    compare: Callable[..., Measurement] = getattr(module, comparison.function)
    try:
        return "measured", None, compare(settings, **dict(comparison.options))
    except BenchUnavailableError as error:
        return "skipped", str(error), None
    except (BenchError, ExchangeError, RuntimeError) as error:
        # RuntimeError is how torch tells that memory ran out; the other comparisons may still fit.
        return "failed", str(error), None
