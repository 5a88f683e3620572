"""What Ray must find in the environment before it is imported, and whether a cluster answers. Imports no Ray."""

import contextlib
import os
import socket
from pathlib import Path

from dsmoe_ray.errors import ConfigError

_CONNECT_TIMEOUT_S = 5.0

# A local Ray listens on the loopback interface only and reports to nobody. Ray reads the first when it is imported; its
# name is historical: without a cluster, nodes go by their loopback address on every system.
_LOCAL_RAY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

_LOCAL_SERVING = {
    # Workers of Ray are patient by default; these are asked by people who wait.
    "RAY_worker_niceness": "0",
    # The proxy in Python costs a token several times as much.
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # A router's threads wait for experts that compute on the same cores: by default they would spin for milliseconds.
    "GOMP_SPINCOUNT": "2000",
    # A busy machine may take longer than the default of 5 s to start a process.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "45",
    # How long a gateway that stops can still be reached: there is one ingress, and it hears of it at once.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
}
# Otherwise fixed, so that two applications on a machine would be in each other's way.
_LOCAL_PORTS = (
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
)


def prepare_local_ray() -> None:
    """Say what a Ray on this machine alone needs, where the environment does not say it already."""
    for name, value in _LOCAL_RAY.items():
        os.environ.setdefault(name, value)


def prepare_to_join(address: str) -> None:
    """Say what a process needs that joins the Ray at an address: one on loopback is a local one."""
    if address.rpartition(":")[0] not in ("127.0.0.1", "localhost"):
        return
    prepare_local_ray()
    # A local Ray asks for the token that it leaves here; who joins it has to be told that there is one.
    if "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def prepare_local_serving() -> None:
    """Say the same for Ray Serve on this machine alone, with HAProxy as its ingress."""
    prepare_local_ray()
    for name, value in _LOCAL_SERVING.items():
        os.environ.setdefault(name, value)
    with contextlib.ExitStack() as taken:
        for name in _LOCAL_PORTS:
            listener = taken.enter_context(socket.create_server(("127.0.0.1", 0)))
            os.environ.setdefault(name, str(listener.getsockname()[1]))


def check_answers(address: str) -> None:
    """Refuse a ``HOST:PORT`` where nothing listens: Ray itself goes on trying for minutes.

    Raises:
        ConfigError: nothing listens there.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdecimal():
        # "auto" and the like, which Ray looks up.
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {error}. Check --address and RAY_ADDRESS, or leave both out to "
            "start a local Ray."
        ) from error
