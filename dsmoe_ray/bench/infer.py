"""``dsmoe bench infer``: every comparison of the inference engine and its bar."""

from collections.abc import Iterator, Sequence

from dsmoe_ray.bench.comparisons import Comparison, choose_on_cpu
from dsmoe_ray.bench.measure import Bar
from dsmoe_ray.bench.settings import Settings

_LARGE = "granite_191m"
_DTYPES = ("float32", "bfloat16")
_BATCHES = (1, 8, 32)

# Least ratio of our decode tokens/s to a peer's, by batch size; None is told without a bar.
_PEER_BARS: dict[str, dict[int, float | None]] = {
    "transformers": {1: 3.0, 8: 3.0, 32: 3.0},
    "llama_cpp": {1: 1.0, 8: 1.2, 32: None},
    "vllm": {1: 2.0, 8: 1.3, 32: None},
}


def choose_comparisons(names: Sequence[str], settings: Settings) -> list[Comparison]:
    """Return the comparisons with these names, or whose names begin so; by default all.

    Raises:
        ConfigError: a name fits none, a peer is unknown, or the device is no CPU.
    """
    return choose_on_cpu("infer", names, settings, offered=_list_comparisons(), peers=_PEER_BARS)


def _list_comparisons() -> Iterator[Comparison]:
    for dtype in _DTYPES:
        yield from (_decode(_LARGE, dtype, batch) for batch in _BATCHES)
        yield _prefill(dtype)
        yield _bandwidth(dtype)
        yield from (_routing(dtype, batch) for batch in _BATCHES)
        yield _memory(dtype)
        yield _numerics(dtype)
        if dtype == "bfloat16":
            yield from (_int8(dtype, batch) for batch in _BATCHES)
        yield _decode("quickstart", dtype, 1)
        for peer, bars in _PEER_BARS.items():
            yield from (_peer(peer, dtype, batch, bar) for batch, bar in bars.items())


def _options(workload: str, dtype: str, batch_size: int | None = None) -> tuple[tuple[str, str], ...]:
    options = (("workload", workload), ("dtype", dtype))
    return options if batch_size is None else (*options, ("batch_size", str(batch_size)))


def _decode(workload: str, dtype: str, batch_size: int) -> Comparison:
    is_large = workload == _LARGE
    yardstick = "the ratio of bytes read" if batch_size == 1 else "what the roofline allows"
    return Comparison(
        name=f"decode_{workload}_{dtype}_b{batch_size}",
        what=f"sparse decode over the dense twin's, {workload}, {dtype}, batch {batch_size}"
        + (f", as a share of {yardstick}" if is_large else ", in the cache"),
        unit="share of the predicted ratio" if is_large else "ratio of tokens/s",
        bar=Bar("at_least", 0.8) if is_large else None,
        module="sparse_decode",
        function="compare_decode_with_twin",
        options=_options(workload, dtype, batch_size),
    )


def _prefill(dtype: str) -> Comparison:
    return Comparison(
        name=f"prefill_{dtype}_b8",
        what=f"sparse prefill over the dense twin's, {_LARGE}, {dtype}, 8 prompts, as a share of the ratio of FLOPs",
        unit="share of the predicted ratio",
        bar=Bar("at_least", 0.6),
        module="sparse_decode",
        function="compare_prefill_with_twin",
        options=_options(_LARGE, dtype, 8),
    )


def _bandwidth(dtype: str) -> Comparison:
    return Comparison(
        name=f"bandwidth_{dtype}",
        what=f"rate of reading at batch 1 over the rate at which this machine reads memory, {_LARGE}, {dtype}",
        unit="share",
        bar=Bar("at_least", 0.8),
        module="sparse_decode",
        function="measure_bandwidth_share",
        options=_options(_LARGE, dtype),
    )


def _routing(dtype: str, batch_size: int) -> Comparison:
    return Comparison(
        name=f"routing_{dtype}_b{batch_size}",
        what=f"routers, selection and grouping in a decode step, {_LARGE}, {dtype}, batch {batch_size}",
        unit="share of the time",
        bar=Bar("at_most", 0.05),
        module="sparse_decode",
        function="measure_routing_share",
        options=_options(_LARGE, dtype, batch_size),
    )


def _memory(dtype: str) -> Comparison:
    return Comparison(
        name=f"memory_{dtype}",
        what=f"peak memory over weights and KV cache, {_LARGE}, {dtype}, batch 32",
        unit="ratio of bytes",
        bar=Bar("at_most", 1.15),
        module="engine_memory",
        function="measure_peak",
        options=_options(_LARGE, dtype, 32),
    )


def _numerics(dtype: str) -> Comparison:
    return Comparison(
        name=f"exact_{dtype}_b8",
        what=f"decode with exact numerics over fast ones, {_LARGE}, {dtype}, batch 8",
        bar=None,
        module="sparse_decode",
        function="compare_numerics",
        options=_options(_LARGE, dtype, 8),
    )


def _int8(dtype: str, batch_size: int) -> Comparison:
    return Comparison(
        name=f"int8_over_{dtype}_b{batch_size}",
        what=f"decode with matrices of int8 over {dtype}, {_LARGE}, batch {batch_size}",
        bar=None,
        module="sparse_decode",
        function="compare_int8",
        options=_options(_LARGE, dtype, batch_size),
    )


def _peer(peer: str, dtype: str, batch_size: int, at_least: float | None) -> Comparison:
    return Comparison(
        name=f"{peer}_{dtype}_b{batch_size}",
        what=f"our decode over that of {peer}, {_LARGE}, {dtype}, batch {batch_size}",
        bar=None if at_least is None else Bar("at_least", at_least),
        module="engine_peers",
        function="compare_with_peer",
        options=(*_options(_LARGE, dtype, batch_size), ("peer", peer)),
    )
