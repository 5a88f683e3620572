"""Which Ray a run refuses before it asks Ray."""

import os
import socket

import pytest

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.ray_environment import check_answers, prepare_to_join


def test_an_address_where_nothing_listens_is_refused_at_once():
    with socket.socket() as taken:
        # Bound and not listening, so that nobody else can answer there.
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="no Ray cluster answers at 127"):
            check_answers(f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("address", ["auto", "local"])
def test_an_address_that_ray_looks_up_is_left_to_it(address):
    check_answers(address)


@pytest.mark.parametrize(("address", "is_local"), [("127.0.0.1:6379", True), ("10.0.0.1:6379", False), ("auto", False)])
def test_who_joins_a_ray_on_loopback_goes_by_loopback(address, is_local, monkeypatch):
    for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "so that it is forgotten afterwards")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    prepare_to_join(address)
    assert ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in os.environ) == is_local
    assert (os.environ.get("RAY_AUTH_MODE") == "token") == is_local
