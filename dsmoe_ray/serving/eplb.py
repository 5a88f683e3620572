"""DeepSeek's published rule for balancing experts (EPLB), in our own words, as the baseline that ours is compared with.

The rule, from its description: every layer has a fixed number of slots, the same on every host. Slots beyond one for
each expert go, one at a time, to the expert whose replicas bear most. Then replicas, the heaviest first, go to the
host with the least load among those with a free slot. Where hosts come in nodes and experts in groups, groups are first
packed onto nodes by the same rule, and all else happens within a node. The placement in force plays no part.

Shape letters: L layers, E experts of a layer, R slots of a layer.
"""

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class EplbPlacement:
    """Where the replicas of every layer go."""

    counts_LE: np.ndarray
    """Replicas of each expert."""
    expert_ids_LR: np.ndarray
    """Expert in each slot."""
    hosts_LR: np.ndarray
    """Host of each slot; an expert may have two replicas on one host."""


def replicate(loads_E: np.ndarray, num_slots: int) -> np.ndarray:
    """Return replicas per expert: one each, and the rest one at a time where a replica bears most.

    Raises:
        ValueError: there are fewer slots than experts.
    """
    num_experts = len(loads_E)
    if num_slots < num_experts:
        raise ValueError(f"{num_slots} slots cannot hold {num_experts} experts")
    counts = [1] * num_experts
    loads = [float(load) for load in loads_E]
    heap = [(-load, expert_id) for expert_id, load in enumerate(loads)]
    heapq.heapify(heap)
    for _ in range(num_slots - num_experts):
        _, expert_id = heap[0]
        counts[expert_id] += 1
        heapq.heapreplace(heap, (-loads[expert_id] / counts[expert_id], expert_id))
    return np.array(counts, dtype=np.int64)


def pack_evenly(weights: np.ndarray, num_packs: int) -> np.ndarray:
    """Return each item's pack, all with equally many: the heaviest first, to the lightest that is not full."""
    room = len(weights) // num_packs
    if room * num_packs != len(weights):
        raise ValueError(f"{len(weights)} items cannot be shared out evenly among {num_packs} packs")
    packs = np.zeros(len(weights), dtype=np.int64)
    heap = [(0.0, pack) for pack in range(num_packs)]
    num_items = [0] * num_packs
    for item in np.argsort(-weights, kind="stable").tolist():
        weight, pack = heapq.heappop(heap)
        packs[item] = pack
        num_items[pack] += 1
        if num_items[pack] < room:
            heapq.heappush(heap, (weight + float(weights[item]), pack))
    return packs


def plan_eplb(
    loads_LE: np.ndarray, *, num_slots: int, num_hosts: int, num_groups: int = 1, num_nodes: int = 1
) -> EplbPlacement:
    """Place every layer's experts by the published rule.

    Args:
        loads_LE: Load of each expert of each layer.
        num_slots: Replicas of each layer in all; a multiple of ``num_hosts``.
        num_hosts: Hosts; host h is on node ``h // (num_hosts // num_nodes)``.
        num_groups: Groups of neighbouring experts that stay on one node; nodes count only if they divide it.
        num_nodes: Nodes.
    """
    if num_groups % num_nodes or loads_LE.shape[1] % num_groups or num_hosts % num_nodes:
        num_groups = num_nodes = 1
    parts = [_place_layer(loads_E, num_slots, num_hosts, num_groups, num_nodes) for loads_E in loads_LE]
    counts, expert_ids, hosts = (np.stack(arrays) for arrays in zip(*parts, strict=True))
    return EplbPlacement(counts_LE=counts, expert_ids_LR=expert_ids, hosts_LR=hosts)


def _place_layer(
    loads_E: np.ndarray, num_slots: int, num_hosts: int, num_groups: int, num_nodes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return counts by expert, and experts and hosts by slot."""
    group_size = len(loads_E) // num_groups
    node_of_group = pack_evenly(loads_E.reshape(num_groups, group_size).sum(axis=1), num_nodes)
    hosts_per_node, slots_per_node = num_hosts // num_nodes, num_slots // num_nodes
    counts_E = np.zeros(len(loads_E), dtype=np.int64)
    expert_ids, hosts = [], []
    for node in range(num_nodes):
        members = np.flatnonzero(np.repeat(node_of_group, group_size) == node)
        counts_E[members] = replicate(loads_E[members], slots_per_node)
        replicas = np.repeat(members, counts_E[members])
        expert_ids.append(replicas)
        hosts.append(node * hosts_per_node + pack_evenly(loads_E[replicas] / counts_E[replicas], hosts_per_node))
    return counts_E, np.concatenate(expert_ids), np.concatenate(hosts)
