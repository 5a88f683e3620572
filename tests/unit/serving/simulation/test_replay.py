"""A trace through all systems: accounts add up, and what scaling is for is seen."""

import json

import numpy as np
import pytest

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.serving.simulation.config import SimulationConfig
from dsmoe_ray.serving.simulation.queueing import LatencyHistogram, serve_window
from dsmoe_ray.serving.simulation.replay import replay
from dsmoe_ray.serving.simulation.report import to_json, to_lines, to_table
from dsmoe_ray.serving.simulation.traces import open_trace

SMALL = "layers=2,experts=16,tokens_per_s=4000,duration_s=40,period_s=40"


def make_config(**changes) -> SimulationConfig:
    return SimulationConfig(**({"hosts": 16, "experts_per_host": 12, "warm_up_s": 5, "host_start_s": 2} | changes))


def test_a_window_is_served_as_the_model_says():
    config = make_config(tokens_per_host_s=100, tokens_per_call=10, network_s=0.001)
    served = serve_window(np.array([10.0, 50.0]), np.array([0.0, 5.0]), 0.25, config)
    # The first host is busy to 0.4: a call of 0.1 s waits 0.4 / (2 * 0.6) of itself.
    assert served.latencies_s[0] == pytest.approx(0.001 + 0.1 * (1 + 0.4 / 1.2))
    # The second can compute 25 of 55 tokens and begins with 5: (5 + 30) / 2 lie before a token on average.
    assert served.backlogs.tolist() == [0.0, 30.0]
    assert served.latencies_s[1] == pytest.approx(0.001 + 0.175 + 0.1 * (1 + 0.95 / 0.1))
    assert served.busy_s.tolist() == [0.1, 0.25]


def test_quantiles_are_over_tokens_to_one_per_cent():
    histogram = LatencyHistogram()
    histogram.add(np.array([0.010, 1.0]), np.array([98.0, 2.0]))
    assert histogram.quantile_s(0.5) == pytest.approx(0.010, rel=0.011)
    assert histogram.quantile_s(0.99) == pytest.approx(1.0, rel=0.011)
    assert histogram.mean_s() == pytest.approx(0.0298)


@pytest.fixture(scope="module")
def zipf():
    trace, config = open_trace(f"synthetic:zipf,alpha=1.5,{SMALL}"), make_config()
    return replay(trace, config), config


def test_every_token_is_counted_in_every_system(zipf):
    totals = list(zipf[0].systems.values())
    expected = sum(
        window.sum()
        for number, window in enumerate(open_trace(f"synthetic:zipf,alpha=1.5,{SMALL}").windows(0.25), start=1)
        if number * 0.25 > 5
    )
    assert [total.histogram.num_tokens for total in totals] == pytest.approx([expected] * 3)


def test_own_replicas_cost_less_memory_than_whole_models_and_wait_less_than_fixed_ones(zipf):
    ours, whole, fixed = zipf[0].systems.values()
    assert ours.replica_s < 0.6 * whole.replica_s
    assert ours.host_s < whole.host_s
    assert ours.histogram.quantile_s(0.99) < 0.1 * fixed.histogram.quantile_s(0.99)
    assert fixed.num_loads == 0


def test_the_report_is_plain_and_the_same_numbers_are_shown(zipf):
    report = json.loads(json.dumps(to_json(*zipf, "synthetic:zipf")))
    assert set(report["systems"]) == {"dsmoe", "whole-model replicas", "fixed one-replica experts"}
    assert report["systems"]["dsmoe"]["moved_bytes"] == report["systems"]["dsmoe"]["num_loads"] * (8 << 20)
    assert len(to_table(report).rows) == 3
    assert f"worst ratio {report['balance']['worst_ratio']:.3f}" in to_lines(report)[1]


def test_nothing_is_decided_where_nothing_but_chance_changes():
    config = make_config(hosts=8, min_hosts=8, experts={"tokens_per_replica_s": 1000.0})
    done = replay(open_trace(f"synthetic:uniform,{SMALL},swing=0"), config)
    assert done.num_events == 0
    assert done.systems["dsmoe"].replica_s == 32 * 35


def test_cold_experts_are_served_from_disk_and_leave_memory_again(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [(t / 4, 0, 0, 20) for t in range(120)] + [(10.1, 0, 1, 3)]
    path.write_text(
        "".join(json.dumps({"time": t, "layer": a, "expert": b, "tokens": n}) + "\n" for t, a, b, n in rows)
    )
    config = make_config(hosts=2, warm_up_s=1, experts={"min_replicas": 0, "downscale_delay_s": 3.0})
    ours = replay(open_trace(str(path)), config).systems["dsmoe"]
    assert ours.num_cold_tokens == 3
    assert ours.replica_s == pytest.approx(29, abs=6.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_host": 1}, "cannot hold the trace's 32 experts"),
        ({"warm_up_s": 60}, "all of it would be warm-up"),
    ],
)
def test_a_cluster_that_does_not_fit_the_trace_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replay(open_trace(f"synthetic:zipf,{SMALL}"), make_config(**changes))
