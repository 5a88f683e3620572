"""Our endpoint over HTTP: against another server, and what its gateway costs a token."""

import os
from dataclasses import replace
from pathlib import Path

from dsmoe_ray.bench.engine_side import publish, publish_for_peers
from dsmoe_ray.bench.engine_workloads import ENGINE_WORKLOADS
from dsmoe_ray.bench.http_load import HttpSide, serve_command, start_server
from dsmoe_ray.bench.measure import Measurement, Spread, compare_speed
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.errors import BenchUnavailableError

_MODEL = "bench"


def compare_with_vllm_server(settings: Settings) -> Measurement:
    """Return our tokens/s over those of ``vllm serve``; both servers are up, and each idles in the other's turns."""
    if "vllm_server" not in settings.peers:
        raise BenchUnavailableError("no --peer vllm_server=COMMAND was given; tests/performance/README.md tells how")
    workload = ENGINE_WORKLOADS["granite_224m"]
    theirs_command = [*settings.peers["vllm_server"], "--model", str(publish_for_peers("granite_224m"))]
    options = ("--dtype", "bfloat16", "--threads", str(settings.num_threads))
    artifact = publish("granite_224m", "bfloat16")
    with (
        start_server(_our_command(artifact), environment=_environment(settings), name="dsmoe serve") as (ours_url, _),
        start_server([*theirs_command, *options], name="vllm serve") as (theirs_url, _),
    ):
        ours = HttpSide(ours_url, _MODEL, workload, concurrency=8)
        theirs = HttpSide(theirs_url, _MODEL, workload, concurrency=8)
        found = compare_speed(ours, theirs, settings.turns())
    return replace(found, details={"first_token_s": {"ours": _median_first(ours), "baseline": _median_first(theirs)}})


def measure_gateway(settings: Settings) -> Measurement:
    """Return the CPU that the gateway's thread takes for a streamed token, while the engine has a tiny model.

    The clock is the kernel's for single threads. All count but the busiest of those beside the event loop, as many as
    compute: the engine's.
    """
    workload = ENGINE_WORKLOADS["quickstart"]
    with start_server(
        _our_command(publish("quickstart", "float32")), environment=_environment(settings), name="dsmoe serve"
    ) as (url, process):
        side = HttpSide(url, _MODEL, workload, concurrency=32)
        side.run(settings.turns().warmup_steps)
        figures = []
        for _ in range(settings.turns().num_pairs):
            before = _read_thread_ticks(process.pid)
            side.run(1)
            after = _read_thread_ticks(process.pid)
            spent = {thread: _ms(ticks - before.get(thread, 0)) for thread, ticks in after.items()}
            loop = spent.pop(process.pid)
            others = sorted(spent.values())
            figures.append((loop + sum(others[: -settings.num_threads])) / side.tokens_per_step)
    return Measurement(
        figure=Spread.of(figures),
        ours={"tokens_per_s": side.tokens_per_step / side.times[-1].total_s},
        details={
            "event_loop_ms": loop / side.tokens_per_step,
            "engine_ms": sum(others[-settings.num_threads :]) / side.tokens_per_step,
        },
    )


def _our_command(artifact: Path) -> list[str]:
    return serve_command(artifact, "--expert-hosts", "0", "--set", f"model_name={_MODEL}")


def _environment(settings: Settings) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(settings.num_threads)}


def _median_first(side: HttpSide) -> float:
    return Spread.of([first_s for times in side.times for first_s in times.first_token_s]).median


def _read_thread_ticks(pid: int) -> dict[int, int]:
    """Return the CPU time of each thread of a process in clock ticks, by id; the first thread's is the process' own."""
    ticks: dict[int, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        # The name, in parentheses, may hold anything.
        fields = (task / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks[int(task.name)] = int(fields[11]) + int(fields[12])
    return ticks


def _ms(ticks: int) -> float:
    return 1000.0 * ticks / os.sysconf("SC_CLK_TCK")
