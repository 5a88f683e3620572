from types import SimpleNamespace

import pytest

from dsmoe_ray.serving.config import ServingConfig
from dsmoe_ray.serving.serve_policies import LOAD, MEMORY_BYTES, NEEDED_BYTES, UTILIZATION, HostPolicy, RouterPolicy


def make_values(**changes):
    values = {
        "artifact": "model",
        "hosts": {"count": 2, "max_count": 6},
        "routers": {"count": 1, "max_count": 4},
        "experts": {"target_utilization": 0.5},
    }
    return ServingConfig.model_validate(values | changes).model_dump(mode="json")


def make_context(current, **metrics):
    return SimpleNamespace(
        target_num_replicas=current,
        aggregated_metrics={name: dict(enumerate(values)) for name, values in metrics.items()},
    )


@pytest.mark.parametrize(
    ("utilizations", "wanted"),
    [((0.1, 0.1), 2), ((0.9, 0.9), 4), ((1.0, 1.0, 1.0, 1.0, 1.0, 1.0), 6)],
    ids=["least", "by-load", "most"],
)
def test_hosts_are_as_many_as_their_utilization_wants(utilizations, wanted):
    context = make_context(len(utilizations), **{UTILIZATION: utilizations})
    assert HostPolicy(make_values())(context) == (wanted, {})


def test_hosts_are_as_many_as_the_experts_need_to_be_in_memory():
    metrics = {UTILIZATION: (0.0, 0.0), NEEDED_BYTES: (500.0, 500.0), MEMORY_BYTES: (110.0, 110.0)}
    assert HostPolicy(make_values())(make_context(2, **metrics)) == (5, {})


def test_without_reports_there_are_the_fewest():
    assert HostPolicy(make_values())(make_context(2)) == (2, {})
    assert RouterPolicy(make_values())(make_context(1)) == (1, {})


@pytest.mark.parametrize(("loads", "wanted"), [((0.2,), 1), ((0.8, 0.7), 3), ((2.0, 2.0, 2.0), 4)])
def test_routers_are_as_many_as_their_load_wants(loads, wanted):
    assert RouterPolicy(make_values())(make_context(len(loads), **{LOAD: loads})) == (wanted, {})
