"""Which interface and address ranks use."""

import socket

import pytest

from dsmoe_ray.errors import ExchangeError
from dsmoe_ray.parallel.network import interface_towards, listen_on


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "localhost"])
def test_loopback_is_reached_over_the_loopback_interface(address):
    assert interface_towards(address) in ("lo", "lo0")


def test_a_listener_is_bound_to_the_one_address_it_was_given():
    with listen_on("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_taken_port_is_refused_with_a_reason():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ExchangeError, match=rf"cannot listen on 127.0.0.1 port {port}: .*port free"):
            listen_on("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused():
    # 198.51.100.0/24 is reserved for documentation: nobody's address.
    with pytest.raises(ExchangeError, match="must be one of this machine's"):
        listen_on("198.51.100.1", 0)
