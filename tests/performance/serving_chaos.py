"""Streams while processes are killed, stopped, replaced and scaled: every stream must be the one of a quiet engine.

python tests/performance/serving_chaos.py [--streams 500] [--routers 2] [--hosts 3] [--concurrency 8] [--interval 8]

Prints one JSON object: failed and different streams, and for each kind of disturbance the pauses of the streams that
were under way, p50 and p99. The exit code is 1 if a stream failed or differs.
"""

import argparse
import itertools
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fakes.gateway_server import run_gateway
from tests.fakes.ray_server import RayServer, stream_completion
from tests.fakes.tiny_artifact import write_tiny_artifact

NUM_BODIES = 20
BODIES = [
    {
        "prompt": f"def add{number}(left, right):\n",
        "max_tokens": 400,
        "temperature": 0.8,
        "seed": number,
        "ignore_eos": True,
    }
    for number in range(NUM_BODIES)
]
AFTERMATH_S = 10.0
"""A pause that ends within this time of a disturbance is put down to it."""
STOP_S = 4.0


@dataclass
class Chaos:
    """Disturbs one server after another way, and remembers when."""

    server: RayServer
    options: argparse.Namespace
    times: list = field(default_factory=list)
    """(kind, begin, end)."""
    num_deployments: int = 0

    def disturb(self, kind):
        """Do one thing, and wait until everybody is there again."""
        began_s = time.monotonic()
        getattr(self, f"_{kind}")()
        self.times.append((kind, began_s, time.monotonic()))
        print(f"{kind} took {time.monotonic() - began_s:.1f} s", file=sys.stderr)

    def _kill_host(self):
        self._kill("ExpertHost", self.options.hosts)

    def _kill_router(self):
        self._kill("RouterService", self.options.routers)

    def _kill_controller(self):
        self._kill("ReplicaController", 1)

    def _stop_host(self):
        pid = self.server.pids("ExpertHost")[0]
        os.kill(pid, signal.SIGSTOP)
        time.sleep(STOP_S)
        os.kill(pid, signal.SIGCONT)

    def _rolling_update(self):
        self.num_deployments += 1
        self.server.redeploy(http={"drain_s": 30.0 + self.num_deployments})

    def _scale_down(self):
        for count in (self.options.hosts - 1, self.options.hosts):
            self.server.redeploy(hosts=self.server.values["hosts"] | {"count": count})
            self.server.wait_for_replicas("ExpertHost", count)

    def _kill(self, deployment, count):
        victim = self.server.pids(deployment)[0]
        os.kill(victim, signal.SIGKILL)
        self.server.wait_for_replicas(deployment, count, without=[victim])


def run_streams(url, expected, num_streams, concurrency, stop):
    """Stream one body after another on several threads; return results as (number, Streamed or exception)."""
    numbers, results = iter(range(num_streams)), queue.SimpleQueue()
    lock = threading.Lock()

    def work():
        while not stop.is_set():
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                streamed = stream_completion(url, BODIES[number % NUM_BODIES])
            except Exception as error:
                results.put((number, error, False))
            else:
                results.put((number, streamed, streamed.text == expected[number % NUM_BODIES]))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results.get() for _ in range(results.qsize())]


def collect_pauses(results, times):
    """Return for each kind the longest pause of each stream that was under way."""
    pauses = {}
    for kind, began_s, ended_s in times:
        for _, streamed, _ in results:
            arrivals_s = getattr(streamed, "arrivals_s", [])
            if not arrivals_s or arrivals_s[0] > ended_s or arrivals_s[-1] < began_s:
                continue
            gaps = [
                later - earlier
                for earlier, later in itertools.pairwise(arrivals_s)
                if began_s <= later <= ended_s + AFTERMATH_S
            ]
            pauses.setdefault(kind, []).append(max(gaps, default=0.0))
    return pauses


def describe(pauses):
    """Return percentiles of pauses in seconds."""
    ranked = sorted(pauses)
    return {
        "num_streams": len(ranked),
        "p50_s": round(ranked[len(ranked) // 2], 3),
        "p99_s": round(ranked[min(len(ranked) - 1, int(len(ranked) * 0.99))], 3),
        "max_s": round(ranked[-1], 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--routers", type=int, default=2)
    parser.add_argument("--hosts", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--interval", type=float, default=8.0, help="Seconds of peace between two disturbances.")
    parser.add_argument("--kinds", default="kill_host,kill_router,kill_controller,stop_host,rolling_update,scale_down")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        artifact = write_tiny_artifact(directory / "tiny", max_seq_len=1024)
        with run_gateway(artifact) as local:
            expected = [stream_completion(local.url, body).text for body in BODIES]
        values = {
            "artifact": str(artifact),
            "hosts": {"count": options.hosts, "num_cpus": 0.25},
            "routers": {"count": options.routers, "num_threads": 1, "num_cpus": 0.25},
        }
        server = RayServer(directory, values)
        try:
            server.wait_until_ready()
            report = run_chaos(server, expected, options)
            report["exit_code"] = server.stop()
        finally:
            server.kill()
    print(json.dumps(report))
    sys.exit(bool(report["failed"] or report["different"]))


def run_chaos(server, expected, options):
    """Stream and disturb at the same time; return the report."""
    chaos, stop, results = Chaos(server, options), threading.Event(), []
    streaming = threading.Thread(
        target=lambda: results.extend(run_streams(server.url, expected, options.streams, options.concurrency, stop))
    )
    began_s = time.monotonic()
    streaming.start()
    for kind in itertools.cycle(options.kinds.split(",")):
        streaming.join(options.interval)
        if not streaming.is_alive():
            break
        chaos.disturb(kind)
    failures = [(number, str(found)) for number, found, _ in results if isinstance(found, Exception)]
    different = [number for number, found, same in results if not isinstance(found, Exception) and not same]
    pauses = collect_pauses(results, chaos.times)
    calm = [streamed.longest_pause_s for _, streamed, _ in results if hasattr(streamed, "longest_pause_s")]
    return {
        "streams": len(results),
        "failed": len(failures),
        "first_failures": failures[:5],
        "different": len(different),
        "duration_s": round(time.monotonic() - began_s, 1),
        "disturbances": {kind: sum(one == kind for one, _, _ in chaos.times) for kind in pauses},
        "pauses": {kind: describe(found) for kind, found in pauses.items()},
        "all": describe(calm),
        "load_average": os.getloadavg()[0],
    }


if __name__ == "__main__":
    main()
