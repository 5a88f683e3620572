"""Which network interface ranks talk over, so that nothing listens where it need not.

Linux and macOS; knows nothing of process groups.
"""

import fcntl
import ipaddress
import socket
import struct

from dsmoe_ray.errors import ExchangeError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_SIOCGIFADDR = 0x8915
_LOOPBACK_NAMES = ("lo", "lo0")
_IFREQ = struct.Struct("16s24x")
_PROBE_PORT = 9  # Connecting a datagram socket sends nothing; the number only has to be valid.


def listen_on(address: str, port: int) -> socket.socket:
    """Open a listening socket on one address only.

    Raises:
        ExchangeError: the address is not this machine's, or the port is taken.
    """
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise ExchangeError(
            f"rank 0 cannot listen on {address} port {port}: {error.strerror or error}. "
            "The address must be one of this machine's, and the port free."
        ) from error
    return listener


def interface_towards(address: str) -> str:
    """Return the name of the interface from which this machine reaches ``address``.

    Raises:
        ExchangeError: there is no route, or no interface holds the local end of it.
    """
    family = socket.getaddrinfo(address, _PROBE_PORT, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _PROBE_PORT))
        except OSError as error:
            raise ExchangeError(f"no route from this machine to rank 0 at {address}: {error.strerror}") from error
        local = ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])
    names = [name for _, name in socket.if_nameindex()]
    for name in names:
        if (local.is_loopback and name in _LOOPBACK_NAMES) or local in (*_primary_ipv4(name), *_ipv6(name)):
            return name
    raise ExchangeError(
        f"no network interface holds {local}, from which {address} is reached; found {', '.join(names)}. "
        "Set GLOO_SOCKET_IFNAME to the interface ranks should use."
    )


def _primary_ipv4(interface: str) -> list[Address]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            answer = fcntl.ioctl(control, _SIOCGIFADDR, _IFREQ.pack(interface.encode()))
        except OSError:
            # An interface without an IPv4 address answers so.
            return []
    return [ipaddress.IPv4Address(answer[20:24])]


def _ipv6(interface: str) -> list[Address]:
    try:
        with open("/proc/net/if_inet6", encoding="ascii") as table:
            rows = [line.split() for line in table]
    except FileNotFoundError:
        return []
    return [ipaddress.IPv6Address(int(row[0], 16)) for row in rows if row[5] == interface]
