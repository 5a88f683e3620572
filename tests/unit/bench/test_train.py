"""Which comparisons are made, and that one that cannot be made is a row that says why."""

import pytest

from dsmoe_ray.bench.comparisons import Comparison, measure_all
from dsmoe_ray.bench.measure import Bar
from dsmoe_ray.bench.report import to_json, to_table
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.train import COMPARISONS, GPU_COMPARISON, choose_comparisons
from dsmoe_ray.errors import ConfigError


def make_comparison(**changes):
    values = {"name": "one", "what": "something", "bar": Bar("at_least", 1.0), "module": "two_shards"}
    return Comparison(**{**values, "function": "compare_with_one_process", **changes})


def test_names_choose_by_their_beginning():
    chosen = choose_comparisons(["peer"], Settings())
    assert [comparison.name for comparison in chosen] == ["peer_granitemoe", "peer_jetmoe"]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"--only speed: .*two_shards"):
        choose_comparisons(["speed"], Settings())


def test_a_gpu_gets_its_own_shape_of_the_twin():
    names = [comparison.name for comparison in choose_comparisons([], Settings(device="cuda"))]
    assert GPU_COMPARISON.name in names
    assert not any(name.startswith("dense_twin_quickstart") for name in names)
    assert choose_comparisons([], Settings()) == list(COMPARISONS)


def test_a_comparison_whose_package_is_absent_is_skipped(monkeypatch):
    def import_nothing(name):
        raise ModuleNotFoundError("none", name="transformers")

    monkeypatch.setattr("dsmoe_ray.bench.comparisons.importlib.import_module", import_nothing)
    [row] = measure_all([make_comparison()], Settings())
    assert (row.status, row.reason) == ("skipped", "the package transformers is not installed")
    assert row.passed is None


def test_a_comparison_that_the_device_does_not_allow_is_skipped():
    comparison = make_comparison(options=(("workload", "quickstart"),))
    [row] = measure_all([comparison], Settings(device="cuda"))
    assert row.status == "skipped"
    assert "CPUs" in row.reason
    report = to_json([row], {"cpu": "test"})
    assert report["rows"][0]["figure"] is None
    assert to_table([row]).row_count == 1
