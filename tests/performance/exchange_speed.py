"""Time the four transfers of the dense all-to-all on gloo, both ways, beside a copy in memory of the same tensors.

    python tests/performance/exchange_speed.py --ranks 2 --tokens 2048

Prints the fastest and the median of interleaved rounds in milliseconds, on rank 0; each rank has one thread. Look at
the fastest on a machine that is not idle.
"""

import argparse
import sys
from pathlib import Path
from time import perf_counter

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from dsmoe_ray.parallel.collectives import all_reduce_sum_
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.exchange import CollectiveExchange, MessageExchange
from tests.numerics.ranks import run_in_world

ROUNDS = 60
NUM_EXPERTS = 32


def measure(world, num_tokens, d_model):
    """Return (fastest, median) in milliseconds by what was done."""
    n = world.world_size
    x_TD, gates_TE = torch.randn(num_tokens, d_model), torch.rand(num_tokens, NUM_EXPERTS)
    y_ND, dgates_NL = torch.randn(n * num_tokens, d_model), torch.rand(n * num_tokens, NUM_EXPERTS // n)
    copy_TD, copy_ND = torch.empty_like(x_TD), torch.empty_like(y_ND)
    actions = {"copy of (T, D)": lambda: copy_TD.copy_(x_TD), "copy of (N, D)": lambda: copy_ND.copy_(y_ND)}
    for name, way in (("messages", MessageExchange), ("collectives", CollectiveExchange)):
        exchange = way(world)
        actions |= {
            f"gather, {name}": lambda exchange=exchange: exchange.start_gather(x_TD, gates_TE).wait(),
            f"reduce, {name}": lambda exchange=exchange: exchange.start_reduce(y_ND).wait(),
            f"gather grad, {name}": lambda exchange=exchange: exchange.start_gather_grad(x_TD).wait(),
            f"reduce grad, {name}": lambda exchange=exchange: exchange.start_reduce_grad(y_ND, dgates_NL).wait(),
        }
    times_ms = {name: [] for name in actions}
    for _ in range(ROUNDS):
        for name, action in actions.items():
            all_reduce_sum_(torch.zeros(1))
            started = perf_counter()
            action()
            times_ms[name].append((perf_counter() - started) * 1e3)
    return {name: (min(times), sorted(times)[len(times) // 2]) for name, times in times_ms.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens owned by each rank")
    arguments = parser.parse_args()
    for d_model in (256, 1024):
        results = run_in_world(measure, ParallelConfig(ep=arguments.ranks), arguments.tokens, d_model, timeout_s=300.0)
        print(f"T={arguments.tokens} D={d_model} E={NUM_EXPERTS} ranks={arguments.ranks}  fastest  median (ms)")
        for name, (fastest, median) in results[0].items():
            print(f"  {name:28s} {fastest:8.2f} {median:8.2f}")


if __name__ == "__main__":
    main()
