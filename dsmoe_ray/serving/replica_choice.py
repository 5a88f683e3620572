"""Which replica of an expert a call goes to. A choice without effects.

Work is counted in tokens: an expert costs its tokens and, for the reading of its weights, as much as some more of them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsmoe_ray.serving.plan import LogicalExpert

READING_WORK = 8
"""Tokens that take as long as reading an expert's weights once."""


@dataclass(frozen=True, slots=True)
class HostLoad:
    """What is known of a host at the moment of choosing."""

    outstanding: float
    """Work that was sent there and is not done."""
    seconds_per_work: float
    distance_s: float = 0.0
    """What a call takes longer than to a host on the same node."""


def compute_work(num_tokens: int) -> int:
    """Return the work of one expert on some tokens."""
    return num_tokens + READING_WORK


def choose_replicas(
    num_tokens_per_expert: Mapping[int, int], holders: Mapping[int, Sequence[str]], loads: Mapping[str, HostLoad]
) -> dict[int, str]:
    """Return the host that each expert's tokens go to: the one that will be done first, largest experts first.

    Args:
        num_tokens_per_expert: Of the experts that the call wants.
        holders: At least one host for each of them.
        loads: Of all those hosts.
    """
    done_s = {host: load.distance_s + load.outstanding * load.seconds_per_work for host, load in loads.items()}
    chosen: dict[int, str] = {}

    def assign(expert_id: int, host: str) -> None:
        chosen[expert_id] = host
        done_s[host] += compute_work(num_tokens_per_expert[expert_id]) * loads[host].seconds_per_work

    free = []
    for expert_id in num_tokens_per_expert:
        if len(holders[expert_id]) == 1:
            assign(expert_id, holders[expert_id][0])
        else:
            free.append(expert_id)
    for expert_id in sorted(free, key=lambda one: (-num_tokens_per_expert[one], one)):
        work = compute_work(num_tokens_per_expert[expert_id])
        assign(expert_id, min(holders[expert_id], key=lambda host: done_s[host] + work * loads[host].seconds_per_work))
    return chosen


def choose_refuge(expert: LogicalExpert, hosts: Sequence[str]) -> str:
    """Return which of some hosts loads an expert that no living host holds; all routers choose the same one."""

    def weight(host: str) -> bytes:
        return hashlib.blake2b(f"{expert.layer}/{expert.expert_id}/{host}".encode(), digest_size=8).digest()

    return max(hosts, key=weight)
