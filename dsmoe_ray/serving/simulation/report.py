"""A replay as a table for people and as plain values for programs. Measures nothing."""

from typing import Any

import numpy as np
from rich.table import Table

from dsmoe_ray.serving.simulation.config import SimulationConfig
from dsmoe_ray.serving.simulation.replay import Replay, SystemTotals

_QUANTILES = {"p50": 0.5, "p99": 0.99, "p999": 0.999}


def to_json(replay: Replay, config: SimulationConfig, source: str) -> dict[str, Any]:
    """Return plain values for JSON."""
    balance = replay.balance
    return {
        "trace": source,
        "num_experts": replay.num_experts,
        "simulated_s": replay.simulated_s,
        "wall_s": replay.wall_s,
        "cpu_s": replay.cpu_s,
        "times_real_time": replay.simulated_s / replay.wall_s,
        "decisions": {
            "num": len(replay.decisions),
            **_milliseconds("", [taken.wall_s for taken in replay.decisions]),
            **_milliseconds("cpu_", [taken.cpu_s for taken in replay.decisions]),
            "first_plan_ms": 1e3 * replay.first_plan.wall_s,
            "first_plan_cpu_ms": 1e3 * replay.first_plan.cpu_s,
            "num_events": replay.num_events,
        },
        "systems": {name: _system(totals, config) for name, totals in replay.systems.items()},
        "balance": {
            "num_hosts": config.hosts,
            "slots_per_host": replay.balance_slots,
            "max_over_mean": list(balance.max_over_mean),
            "eplb_max_over_mean": list(balance.eplb_max_over_mean),
            "worst_ratio": balance.worst_ratio,
            "num_loads": balance.num_loads,
            "eplb_num_loads": balance.eplb_num_loads,
            "moved_ratio": balance.moved_ratio,
        },
        "config": config.model_dump(mode="json"),
    }


def _milliseconds(prefix: str, times_s: list[float]) -> dict[str, float]:
    return {
        f"{prefix}p50_ms": 1e3 * float(np.quantile(times_s, 0.5)),
        f"{prefix}p99_ms": 1e3 * float(np.quantile(times_s, 0.99)),
        f"{prefix}max_ms": 1e3 * max(times_s),
    }


def _system(totals: SystemTotals, config: SimulationConfig) -> dict[str, Any]:
    histogram = totals.histogram
    return {
        "num_tokens": histogram.num_tokens,
        "latency_s": {
            "mean": histogram.mean_s(),
            **{name: histogram.quantile_s(share) for name, share in _QUANTILES.items()},
        },
        "host_hours": totals.host_s / 3600,
        "replica_hours": totals.replica_s / 3600,
        "most_hosts": totals.most_hosts,
        "num_loads": totals.num_loads,
        "moved_bytes": totals.num_loads * config.expert_bytes,
        "num_cold_tokens": totals.num_cold_tokens,
        "overloaded_s": totals.overloaded_s,
    }


def to_table(report: dict[str, Any]) -> Table:
    """Return one row per system from the plain values."""
    title = (
        f"{report['trace']}: {report['num_experts']:,} experts, {report['simulated_s']:.0f} s in "
        f"{report['wall_s']:.0f} s, {report['cpu_s']:.0f} s of CPU ({report['times_real_time']:.1f} times real time)"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("system")
    for header in ("p50", "p99", "p99.9 ms", "host-hours", "most", "replica-hours", "loads", "GB", "overloaded s"):
        table.add_column(header, justify="right")
    for name, system in report["systems"].items():
        latency_s = system["latency_s"]
        table.add_row(
            name,
            *(f"{1e3 * latency_s[quantile]:,.1f}" for quantile in _QUANTILES),
            f"{system['host_hours']:,.1f}",
            f"{system['most_hosts']:,.0f}",
            f"{system['replica_hours']:,.0f}",
            f"{system['num_loads']:,}",
            f"{system['moved_bytes'] / 1e9:,.1f}",
            f"{system['overloaded_s']:,.1f}",
        )
    return table


def to_lines(report: dict[str, Any]) -> list[str]:
    """Return what the table does not say."""
    decisions, balance = report["decisions"], report["balance"]
    return [
        f"{decisions['num']} decisions, {decisions['num_events']:,} events; p50, p99 and longest decision "
        f"{decisions['p50_ms']:.0f}, {decisions['p99_ms']:.0f}, {decisions['max_ms']:.0f} ms, of CPU "
        f"{decisions['cpu_p50_ms']:.0f}, {decisions['cpu_p99_ms']:.0f}, {decisions['cpu_max_ms']:.0f} ms; first plan "
        f"{decisions['first_plan_ms']:.0f} ms, of CPU {decisions['first_plan_cpu_ms']:.0f} ms",
        f"beside EPLB on {balance['num_hosts']:,} hosts of {balance['slots_per_host']} slots: max/mean at most "
        f"{max(balance['max_over_mean']):.3f}, EPLB's {max(balance['eplb_max_over_mean']):.3f}, worst ratio "
        f"{balance['worst_ratio']:.3f}; {balance['num_loads']:,} experts loaded, EPLB {balance['eplb_num_loads']:,} "
        f"({balance['moved_ratio']:.2f})",
    ]
