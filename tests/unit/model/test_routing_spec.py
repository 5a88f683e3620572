"""Routing rules as a person writes them, and back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.model.config import RoutingConfig


@pytest.mark.parametrize(
    ("spec", "rule"),
    [
        ("dense", RoutingConfig()),
        ("top_k=8", RoutingConfig(mode="top_k", top_k=8)),
        (" top_k = 8 ", RoutingConfig(mode="top_k", top_k=8)),
        ("threshold=0.48", RoutingConfig(mode="threshold", threshold=0.48)),
        ("threshold=0", RoutingConfig(mode="threshold", threshold=0.0)),
        ("threshold_top_k=1e-2", RoutingConfig(mode="threshold_top_k", threshold=0.01)),
        ("top_p=1", RoutingConfig(mode="top_p", top_p=1.0)),
        ("per_layer_top_k=8,6,4,8", RoutingConfig(mode="per_layer_top_k", per_layer_top_k=(8, 6, 4, 8))),
        ("per_layer_top_k = 8, 6", RoutingConfig(mode="per_layer_top_k", per_layer_top_k=(8, 6))),
    ],
)
def test_a_spec_is_read_as_its_rule(spec, rule):
    assert RoutingConfig.parse(spec) == rule


RULES = st.one_of(
    st.just(RoutingConfig()),
    st.integers(1, 10**6).map(lambda k: RoutingConfig(mode="top_k", top_k=k)),
    st.floats(0, 1e6).map(lambda eps: RoutingConfig(mode="threshold", threshold=eps)),
    st.floats(0, 1e6).map(lambda eps: RoutingConfig(mode="threshold_top_k", threshold=eps)),
    st.floats(0, 1, exclude_min=True).map(lambda p: RoutingConfig(mode="top_p", top_p=p)),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=40).map(
        lambda table: RoutingConfig(mode="per_layer_top_k", per_layer_top_k=tuple(table))
    ),
)


@settings(deadline=None)
@given(RULES)
def test_every_rule_is_read_back_from_its_own_spec(rule):
    assert RoutingConfig.parse(rule.to_spec()) == rule


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "is not one of dense, top_k=K, threshold=E, threshold_top_k=E, top_p=P, per_layer_top_k=K,K,..."),
        ("topk=8", "'topk=8' is not one of dense"),
        ("top_k", "is not one of dense"),
        ("dense=3", "is not one of dense"),
        ("top_k=0", "top_k: must be greater than 0; found '0'"),
        ("top_k=many", "top_k: must be a whole number; found 'many'"),
        ("top_k=2.5", "top_k: must be a whole number; found '2.5'"),
        ("threshold=nan", "threshold: must be a finite number"),
        ("threshold=-1", "threshold: must be greater than or equal to 0"),
        ("top_p=1.5", "top_p: must be less than or equal to 1"),
        ("per_layer_top_k", "is not one of dense"),
        ("per_layer_top_k=", "per_layer_top_k[0]: must be a whole number; found ''"),
        ("per_layer_top_k=8,many", "per_layer_top_k[1]: must be a whole number; found 'many'"),
        ("per_layer_top_k=8,0", "per_layer_top_k[1]: must be greater than 0; found 0"),
        ("per_layer_top_k=8,,4", "per_layer_top_k[1]: must be a whole number; found ''"),
        ("per_layer_top_k=2.5", "per_layer_top_k[0]: must be a whole number; found '2.5'"),
    ],
)
def test_a_bad_spec_tells_what_is_allowed(spec, message):
    with pytest.raises(ConfigError) as caught:
        RoutingConfig.parse(spec)
    assert message in str(caught.value)
