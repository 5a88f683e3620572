"""Run a function on several ranks, each its own process with one thread, and return what each one returned.

Functions must be at the top of a module that can be imported (a test file is fine); arguments and results are pickled.
Processes are forked from a clean server that has imported torch once, so that a rank starts in milliseconds.

    def _sum_of_ranks(world):
        return all_reduce_sum_(torch.tensor([float(world.rank)])).item()

    def test_ranks_are_summed():
        assert run_in_world(_sum_of_ranks, ParallelConfig(dp_replicate=2)) == [1.0, 1.0]
"""

import multiprocessing
import pickle
import socket
import time
import traceback
from multiprocessing.connection import Connection

import torch

from dsmoe_ray.parallel.collectives import join_world, leave_world

_server = multiprocessing.get_context("forkserver")
# torch.optim imports torch._dynamo on first use, which takes longer than most tests.
_server.set_forkserver_preload(["pytest", "torch._dynamo", "torch.utils.checkpoint", "dsmoe_ray.parallel.fsdp"])


class RankProcess:
    """One function running in another process."""

    def __init__(self, function, *args):
        self._connection, theirs = _server.Pipe(duplex=False)
        self._process = _server.Process(target=_run, args=(theirs, function, args), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def pid(self):
        return self._process.pid

    def kill(self):
        """End it as a crash would."""
        self._process.kill()
        self._process.join()

    def result(self, timeout_s=60.0):
        """Return what the function returned; fail with its traceback, or when it died or took too long."""
        try:
            if not self._connection.poll(timeout_s):
                raise AssertionError(f"rank process {self.pid} did not answer within {timeout_s} s")
            succeeded, value = pickle.loads(self._connection.recv_bytes())
        except EOFError:
            self._process.join()
            raise AssertionError(f"rank process {self.pid} died with exit code {self._process.exitcode}") from None
        finally:
            self.kill()
        if not succeeded:
            raise AssertionError(f"in rank process {self.pid}:\n{value}")
        return value


def run_on_ranks(function, num_ranks, *args, timeout_s=60.0):
    """Run ``function(rank, *args)`` on each rank; return the results by rank. The function joins a world by itself."""
    processes = [RankProcess(function, rank, *args) for rank in range(num_ranks)]
    deadline = time.monotonic() + timeout_s
    results, failures = [], []
    for rank, process in enumerate(processes):
        try:
            results.append(process.result(max(0.1, deadline - time.monotonic())))
        except AssertionError as error:
            # The first failure makes its peers fail in a collective; show them all.
            failures.append(f"rank {rank}: {error}")
    if failures:
        raise AssertionError("\n".join(failures))
    return results


def run_in_world(function, config, *args, timeout_s=60.0):
    """Run ``function(world, *args)`` on every rank of a CPU world; return the results by rank."""
    return run_on_ranks(_in_world, config.world_size, free_port(), config, function, args, timeout_s=timeout_s)


def free_port():
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _in_world(rank, port, config, function, args):
    world = join_world(config, rank=rank, address="127.0.0.1", port=port, device=torch.device("cpu"))
    try:
        return function(world, *args)
    finally:
        leave_world()


def _run(connection: Connection, function, args):
    torch.set_num_threads(1)
    try:
        message = (True, function(*args))
    except BaseException:
        message = (False, traceback.format_exc())
    # Pickled here, because multiprocessing would send tensors as handles that die with this process.
    connection.send_bytes(pickle.dumps(message))
    connection.close()
