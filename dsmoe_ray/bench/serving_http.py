"""Our endpoint over HTTP: against another server, and what its gateway costs a token."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

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

    The clock is the kernel's for single threads: that of the event loop, and of those that bring tokens to it.
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
            gateway = {name: ticks - before.get(name, 0) for name, ticks in after.items()}
            figures.append(_ms(sum(t for name, t in gateway.items() if _is_gateway(name))) / side.tokens_per_step)
        by_thread = {name: _ms(ticks) / side.tokens_per_step for name, ticks in gateway.items() if ticks}
    speed = side.tokens_per_step / side.times[-1].total_s
    return Measurement(
        figure=Spread.of(figures), ours={"tokens_per_s": speed}, details={"ms_per_token_by_thread": by_thread}
    )


def _our_command(artifact: Path) -> list[str]:
    return serve_command(artifact, "--expert-hosts", "0", "--set", f"model_name={_MODEL}")


def _environment(settings: Settings) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(settings.num_threads)}


def _median_first(side: HttpSide) -> float:
    return Spread.of([first_s for times in side.times for first_s in times.first_token_s]).median


def _is_gateway(thread_name: str) -> bool:
    return not thread_name.startswith("engine")


def _read_thread_ticks(pid: int) -> dict[str, int]:
    """Return the CPU time of each thread of a process, by name and id, in clock ticks."""
    ticks: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        stat: Any = re.match(r"\d+ \((.*)\) (.*)", (task / "stat").read_text(encoding="utf-8"))
        fields = stat.group(2).split()
        ticks[f"{stat.group(1)}-{task.name}"] = int(fields[11]) + int(fields[12])
    return ticks


def _ms(ticks: int) -> float:
    return 1000.0 * ticks / os.sysconf("SC_CLK_TCK")
