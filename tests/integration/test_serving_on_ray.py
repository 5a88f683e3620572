"""``dsmoe serve --expert-hosts 2`` on a local Ray: the same bytes as one process, whatever is killed meanwhile."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.fakes.gateway_server import run_gateway
from tests.fakes.ray_server import RayServer, stream_completion
from tests.fakes.tiny_artifact import NUM_EXPERTS, write_tiny_artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_STREAMS, NUM_LAYERS = 6, 2
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
    values = {
        "artifact": str(artifact),
        "routers": {"num_threads": 1},
        "hosts": {"count": 2},
        # Quick and lively, so that plans change under way in every test.
        "experts": {
            "min_replicas": 0,
            "max_replicas": 2,
            "target_utilization": 1.0,
            "tokens_per_replica_s": 20.0,
            "upscale_delay_s": 0.5,
            "downscale_delay_s": 2.0,
            "look_back_s": 0.5,
        },
    }
    server = RayServer(tmp_path_factory.mktemp("ray"), values)
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


def test_hot_experts_get_replicas_that_go_again_and_cold_ones_are_read_on_demand(server, expected):
    with server.watched() as events:
        # Nobody has asked for anything lately.
        while len(json.loads(server.scale())["cold"]) < NUM_LAYERS * NUM_EXPERTS:
            time.sleep(0.1)
        began_s, began_unix_s = time.monotonic(), time.time()
        stream = stream_completion(server.url, REQUESTS[0])
        assert stream.text == expected[0]
        print(f"first token of cold experts after {stream.arrivals_s[0] - began_s:.2f} s")
        up = events.wait_for(has_replicas(2), after_unix_s=began_unix_s)
        print(f"replica {up['at_unix_s'] - began_unix_s:.2f} s after the first token: {up['message']}")
        numbers = up["change"]["numbers"]
        assert numbers["tokens_per_s"] > numbers["target_tokens_per_s_of_a_replica"] == 20.0
        down = events.wait_for(has_replicas(0, expert=up["change"]["expert"]), after_unix_s=up["at_unix_s"])
        print(f"gone {down['at_unix_s'] - up['at_unix_s']:.2f} s later")
    grown = [event["change"] for event in events.all if has_replicas(2)(event)]
    assert all(change["numbers"]["tokens_per_s"] > 20.0 for change in grown)


def has_replicas(count, *, expert=None):
    """Return what recognizes events after which an expert has this many replicas because of its load."""

    def matches(event):
        change = event["change"]
        if change is None or change["to_replicas"] != count or change["cause"] != "load":
            return False
        return expert in (None, change["expert"])

    return matches


def test_streams_go_on_through_a_rolling_update_and_a_scale_down(server, expected):
    server.wait_until_ready()
    old = {deployment: server.pids(deployment) for deployment in ("Gateway", "RouterService", "ExpertHost")}
    done, results = threading.Event(), []

    def keep_streaming():
        while not done.is_set():
            results.extend(stream.text for stream in stream_all(server.url))

    streaming = threading.Thread(target=keep_streaming)
    streaming.start()
    try:
        server.redeploy(http={"drain_s": 31.0})
        for deployment, pids in old.items():
            server.wait_for_replicas(deployment, len(pids), without=pids)
        server.redeploy(hosts={"count": 1})
        server.wait_for_replicas("ExpertHost", 1)
    finally:
        done.set()
        streaming.join()
    assert results == expected * (len(results) // NUM_STREAMS)


def test_the_command_ends_the_requests_under_way_and_then_itself(server, expected):
    server.wait_until_ready()
    begun = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        stream = threads.submit(stream_completion, server.url, REQUESTS[0], on_piece=lambda _: begun.set())
        assert begun.wait(60)
        assert server.stop() == 0
        assert stream.result().text == expected[0]
