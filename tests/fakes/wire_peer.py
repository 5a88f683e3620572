"""A process that serves a connection, to be killed or stopped: ``python -m tests.fakes.wire_peer ADDRESS``.

Prints its address, then sends back every frame.
"""

import sys
import threading

from dsmoe_ray.clock import sleep_s
from dsmoe_ray.serving.wire.handshake import Hello
from dsmoe_ray.serving.wire.transport import open_listener

SECRET = b"0123456789abcdef" * 2
HOST = Hello(role="host", model_digest="m1", identity={"host_id": "h1"})


def echo(connection):
    while True:
        connection.send(connection.receive())


def wait_for(condition):
    """Wait until something holds that another thread is about to do; a test that waits for long has failed."""
    for _ in range(3000):
        if condition():
            return
        sleep_s(0.01)


if __name__ == "__main__":
    listener = open_listener(sys.argv[1], echo, HOST, secret=SECRET)
    print(listener.address, flush=True)
    threading.Event().wait()
