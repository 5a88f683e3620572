"""``dsmoe serve --expert-hosts N`` as a process of its own, its replicas by process id, and its events."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import psutil
import yaml

DEADLINE_S = 180.0
"""Generous: the machine may be busy, and time is not what these tests judge."""


REDEPLOY = """
import json, sys
from dsmoe_ray.ray_environment import prepare_to_join
prepare_to_join(sys.argv[1])
import ray
from ray import serve
from dsmoe_ray.serving.app import build_app
ray.init(address=sys.argv[1], log_to_driver=False)
serve.run(build_app(json.loads(sys.argv[2])), name="dsmoe", route_prefix="/")
"""


class RayServer:
    """A server, and all its processes."""

    def __init__(self, directory, values):
        """Start it; ``values`` are the sections of its config."""
        self.values = values
        self.environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.environment["OMP_NUM_THREADS"] = "1"
        config, self.log = directory / "serve.yaml", directory / "serve.log"
        config.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "dsmoe_ray", "serve", str(config), "--port", "0"]
        with self.log.open("w") as stream:
            # A session of its own: a signal for the command alone reaches no process of Ray.
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )
        try:
            text = self._wait_for(r"Serving .* at (http\S+)/v1")
            self.url = text.group(1)
            self.ray_address = self._wait_for(r"--address (\S+)").group(1)
        except BaseException:
            self.kill()
            raise

    def redeploy(self, **sections):
        """Deploy the application again with other sections; returns when it runs."""
        self.values = self.values | sections
        command = [sys.executable, "-c", REDEPLOY, self.ray_address, json.dumps(self.values)]
        subprocess.run(command, check=True, timeout=2 * DEADLINE_S, env=self.environment, stdout=subprocess.DEVNULL)

    def pids(self, deployment):
        """Return the processes of a deployment's replicas."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            if title.startswith("ray::ServeReplica:") and f":{deployment}" in title:
                found.append(process.pid)
        return sorted(found)

    def wait_for_replicas(self, deployment, count, *, without=()):
        """Wait until a deployment has this many processes, none of them among ``without``."""
        end_s = time.monotonic() + DEADLINE_S
        while True:
            pids = [pid for pid in self.pids(deployment) if pid not in without]
            if len(pids) == count:
                return pids
            assert time.monotonic() < end_s, (deployment, pids, self.log.read_text())
            time.sleep(0.05)

    def wait_until_ready(self):
        """Wait until every token could be computed."""
        end_s = time.monotonic() + DEADLINE_S
        while True:
            response = httpx.get(f"{self.url}/ready", timeout=30)
            if response.status_code == 200:
                return
            assert time.monotonic() < end_s, response.text
            time.sleep(0.05)

    def scale(self, *arguments):
        """Return what ``dsmoe scale`` prints as JSON."""
        command = [sys.executable, "-m", "dsmoe_ray", "scale", "--address", self.ray_address, "--json", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DEADLINE_S, env=self.environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    @contextmanager
    def watched(self):
        """Collect the controller's events while the block lasts."""
        command = [sys.executable, "-m", "dsmoe_ray", "scale", "--address", self.ray_address, "--json", "--follow"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.environment)
        try:
            yield Events(process)
        finally:
            process.kill()
            process.wait()

    def stop(self):
        """Ask the command to stop; return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=DEADLINE_S)

    def kill(self):
        """End everything that is still there."""
        if self.process.poll() is not None:
            return
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()

    def _wait_for(self, pattern):
        end_s = time.monotonic() + DEADLINE_S
        while True:
            found = re.search(pattern, self.log.read_text())
            if found:
                return found
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end_s, self.log.read_text()
            time.sleep(0.05)


class Events:
    """Events of a controller, as they come."""

    def __init__(self, process):
        self.all = []
        self._came = threading.Condition()
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    def wait_for(self, matches, *, after_unix_s=0.0):
        """Return the first event for which ``matches`` is true."""
        end_s = time.monotonic() + DEADLINE_S
        with self._came:
            while True:
                for event in self.all:
                    if event["at_unix_s"] >= after_unix_s and matches(event):
                        return event
                assert self._came.wait(end_s - time.monotonic()), [event["message"] for event in self.all]

    def _read(self, stream):
        for line in stream:
            with self._came:
                self.all.append(json.loads(line))
                self._came.notify_all()


@dataclass
class Streamed:
    """One streamed completion: its text, and the longest pause between two pieces."""

    text: str = ""
    finish_reason: str | None = None
    longest_pause_s: float = 0.0
    num_pieces: int = 0
    arrivals_s: list = field(default_factory=list)


def stream_completion(url, body, *, on_piece=None, headers=None):
    """Stream a completion to its end."""
    result = Streamed()
    last_s = None
    with (
        httpx.Client(timeout=DEADLINE_S) as client,
        client.stream("POST", f"{url}/v1/completions", json={"stream": True, **body}, headers=headers) as response,
    ):
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: "):
                assert not line.startswith("event: error"), line
                continue
            if line == "data: [DONE]":
                break
            piece = json.loads(line.removeprefix("data: "))
            assert "error" not in piece, piece
            now_s = time.monotonic()
            if last_s is not None:
                result.longest_pause_s = max(result.longest_pause_s, now_s - last_s)
            last_s = now_s
            result.arrivals_s.append(now_s)
            for choice in piece["choices"]:
                result.text += choice["text"]
                result.finish_reason = choice["finish_reason"] or result.finish_reason
            result.num_pieces += 1
            if on_piece is not None:
                on_piece(result)
    assert result.finish_reason is not None, "the stream has no end"
    return result
