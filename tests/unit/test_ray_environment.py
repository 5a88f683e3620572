"""Which Ray a run refuses before it asks Ray."""

import socket

import pytest

from dsmoe_ray.errors import ConfigError
from dsmoe_ray.ray_environment import check_answers


def test_an_address_where_nothing_listens_is_refused_at_once():
    with socket.socket() as taken:
        # Bound and not listening, so that nobody else can answer there.
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="no Ray cluster answers at 127"):
            check_answers(f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("address", ["auto", "local"])
def test_an_address_that_ray_looks_up_is_left_to_it(address):
    check_answers(address)
