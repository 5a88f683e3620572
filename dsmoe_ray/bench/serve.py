"""``dsmoe bench serve``: every comparison of the serving path and its bar."""

from collections.abc import Iterator, Sequence

from dsmoe_ray.bench.comparisons import Comparison, choose_on_cpu
from dsmoe_ray.bench.measure import Bar
from dsmoe_ray.bench.settings import Settings

_TRANSPORTS = ("unix", "grpc")
_PEERS = ("vllm_server",)


def choose_comparisons(names: Sequence[str], settings: Settings) -> list[Comparison]:
    """Return the comparisons with these names, or whose names begin so; by default all.

    Raises:
        ConfigError: a name fits none, a peer is unknown, or the device is no CPU.
    """
    return choose_on_cpu("serve", names, settings, offered=_list_comparisons(), peers=_PEERS)


def _list_comparisons() -> Iterator[Comparison]:
    for transport in _TRANSPORTS:
        for num_tokens in (1, 16):
            yield Comparison(
                name=f"call_{transport}_t{num_tokens}",
                what=f"remote expert call over a bare echo of the same bytes over {transport}, {num_tokens} tokens of "
                "the 191M model, float32, exact, compute apart",
                unit="ratio of p50 times",
                bar=Bar("at_most", 1.5),
                module="expert_calls",
                function="compare_with_echo",
                options=(("transport", transport), ("num_tokens", str(num_tokens))),
            )
    for dtype in ("float32", "bfloat16"):
        for numerics in ("exact", "fast"):
            yield Comparison(
                name=f"remote_{dtype}_{numerics}_b16",
                what=f"decode through two expert hosts over that in one process, 191M, {dtype}, {numerics}, batch 16",
                bar=Bar("at_least", 0.7),
                module="remote_decode",
                function="compare_with_local",
                options=(("dtype", dtype), ("numerics", numerics), ("batch_size", "16")),
            )
    yield Comparison(
        name="http_vllm_c8",
        what="tokens over HTTP, one process, over vLLM's server, 224M, bfloat16, 8 streams",
        bar=Bar("at_least", 2.0),
        module="serving_http",
        function="compare_with_vllm_server",
    )
    yield Comparison(
        name="gateway_c32",
        what="CPU of the gateway per streamed token, 32 streams",
        unit="ms",
        bar=Bar("at_most", 0.2),
        module="serving_http",
        function="measure_gateway",
    )
    yield Comparison(
        name="add_replica",
        what="loading an expert into a running host, beyond reading its bytes from this disk, 191M, float32",
        unit="ms",
        bar=Bar("at_most", 50.0),
        module="scaling_costs",
        function="measure_added_replica",
    )
    for start in ("nothing", "drift", "shuffle"):
        yield Comparison(
            name=f"planner_{start}",
            what=f"planning 10,000 experts onto 1,000 hosts, from {start}",
            unit="s",
            bar=Bar("at_most", 1.0),
            module="scaling_costs",
            function="measure_planner",
            options=(("start", start),),
        )
