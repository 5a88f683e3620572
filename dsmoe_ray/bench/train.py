"""``dsmoe bench train``: every comparison of the training step and its bar."""

from collections.abc import Sequence

from dsmoe_ray.bench.comparisons import Comparison, choose_by_name
from dsmoe_ray.bench.measure import Bar
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.errors import ConfigError

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
        ConfigError: a name fits none, or other engines are named, which do not train.
    """
    if settings.peers:
        raise ConfigError("--peer is for bench infer; other engines do not train. Leave it out.")
    if names:
        return choose_by_name(names, [*COMPARISONS, GPU_COMPARISON])
    if settings.device == "cpu":
        return list(COMPARISONS)
    return [GPU_COMPARISON, *(c for c in COMPARISONS if c.module != "dense_twin")]
