"""``dsmoe serve --expert-hosts 2`` on a local Ray: the same bytes as one process, whatever is killed meanwhile."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.fakes.gateway_server import run_gateway
from tests.fakes.ray_server import RayServer, stream_completion
from tests.fakes.tiny_artifact import write_tiny_artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_STREAMS = 6
REQUESTS = [
    {
        "prompt": f"def add{number}(left, right):\n",
        "max_tokens": 600,
        "temperature": 0.8,
        "seed": number,
        "ignore_eos": True,
    }
    for number in range(NUM_STREAMS)
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return write_tiny_artifact(tmp_path_factory.mktemp("served") / "tiny", max_seq_len=1024)


@pytest.fixture(scope="module")
def expected(artifact):
    """The texts that one engine in one process gives."""
    with run_gateway(artifact) as local:
        return [stream_completion(local.url, body).text for body in REQUESTS]


@pytest.fixture(scope="module")
def server(artifact, tmp_path_factory):
    server = RayServer(artifact, tmp_path_factory.mktemp("ray"), "--set", "routers.num_threads=1")
    yield server
    server.kill()


def stream_all(url, *, on_piece=None):
    with ThreadPoolExecutor(len(REQUESTS)) as threads:
        return list(threads.map(lambda body: stream_completion(url, body, on_piece=on_piece), REQUESTS))


def test_two_hosts_give_the_bytes_of_one_process(server, expected):
    server.wait_until_ready()
    assert [stream.text for stream in stream_all(server.url)] == expected
    assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny"


@pytest.mark.parametrize("deployment", ["ExpertHost", "RouterService", "ReplicaController"])
def test_streams_go_on_when_a_process_is_killed(server, expected, deployment):
    server.wait_until_ready()
    victim = server.pids(deployment)[0]
    begun = threading.Event()
    killed = []

    def kill_at_once(result):
        if result.num_pieces >= 5 and not begun.is_set():
            begun.set()
            os.kill(victim, signal.SIGKILL)
            killed.append(time.monotonic())

    streams = stream_all(server.url, on_piece=kill_at_once)
    assert killed and any(stream.arrivals_s[-1] > killed[0] for stream in streams), "it was over before"
    assert [stream.text for stream in streams] == expected
    print(f"{deployment}: longest pause {max(stream.longest_pause_s for stream in streams):.2f} s")
    server.wait_for_replicas(deployment, 2 if deployment == "ExpertHost" else 1, without=[victim])


def test_the_command_ends_the_requests_under_way_and_then_itself(server, expected):
    server.wait_until_ready()
    begun = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(stream_completion, server.url, REQUESTS[0], on_piece=lambda _: begun.set())
        assert begun.wait(60)
        assert server.stop() == 0
        assert stream.result().text == expected[0]
