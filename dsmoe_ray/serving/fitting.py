"""Replicas into memory: how many of each there can be, which leave, and where new ones go.

Three steps, each deterministic; where two choices are equally good, the lower number wins.

1. ``grant_replicas``: counts that fit the hosts' memory together.
2. ``drop_surplus``: replicas beyond that leave the most loaded hosts.
3. ``add_missing``: the largest first, onto the least loaded host with room, on a node of its own where there is one.

Shape letters: E experts, H hosts.
"""

import heapq

import numpy as np

from dsmoe_ray.serving.packing import Packing

# An expert in memory stays there against one on disk unless that one's load is so many times higher.
_STAY_RATIO = 1.25


def grant_replicas(packing: Packing, wanted_E: np.ndarray) -> np.ndarray:
    """Return counts that the hosts' memory can hold together: one of each first, then where a replica bears most."""
    wanted_E = np.minimum(wanted_E, packing.num_hosts)
    budget = _usable_bytes(packing)
    if int((wanted_E * packing.bytes_E).sum()) <= budget:
        return wanted_E
    held_E = packing.counts_E
    urgency_E = packing.loads_E * np.where(held_E > 0, _STAY_RATIO, 1.0)
    order = np.lexsort((np.arange(len(wanted_E)), -urgency_E))
    order = order[wanted_E[order] > 0]
    first = order[np.cumsum(packing.bytes_E[order]) <= budget]
    granted_E = np.zeros_like(wanted_E)
    granted_E[first] = 1
    budget -= int(packing.bytes_E[first].sum())

    def bearing(expert: int) -> float:
        count = int(granted_E[expert])
        return float(packing.loads_E[expert]) / count * (_STAY_RATIO if count < held_E[expert] else 1.0)

    heap = [(-bearing(expert), expert) for expert in first.tolist() if wanted_E[expert] > 1]
    heapq.heapify(heap)
    while heap:
        _, expert = heapq.heappop(heap)
        if packing.bytes_E[expert] > budget:
            continue
        budget -= int(packing.bytes_E[expert])
        granted_E[expert] += 1
        if granted_E[expert] < wanted_E[expert]:
            heapq.heappush(heap, (-bearing(expert), expert))
    return granted_E


def _usable_bytes(packing: Packing) -> int:
    """Return the hosts' memory without the rests that are too small for an expert, where all are of one size."""
    if len(packing.bytes_E) and packing.bytes_E.min() == packing.bytes_E.max():
        size = max(1, int(packing.bytes_E[0]))
        return int((packing.memory_H // size * size).sum())
    return int(packing.memory_H.sum())


def drop_surplus(packing: Packing, granted_E: np.ndarray) -> None:
    """Remove replicas beyond the granted counts and beyond a host's memory."""
    for expert in np.flatnonzero(packing.counts_E > granted_E).tolist():
        while packing.counts_E[expert] > granted_E[expert]:
            hosts = packing.hosts_of[expert]
            leaver = max(hosts, key=lambda host: (packing.num_on_node(expert, host) > 1, packing.load_H[host], -host))
            packing.remove(expert, leaver)
    for host in np.flatnonzero(packing.free_H < 0).tolist():
        for expert in sorted(packing.experts_on[host], key=lambda expert: (packing.shares_E[expert], expert)):
            if packing.free_H[host] < 0:
                packing.remove(expert, host)


def add_missing(packing: Packing, granted_E: np.ndarray) -> None:
    """Add replicas up to the granted counts, as far as there is room for them."""
    missing_E = np.maximum(granted_E - packing.counts_E, 0)
    if not missing_E.any():
        return
    order = np.lexsort((np.arange(len(granted_E)), -packing.shares_E))
    heap = [_entry(packing, host) for host in range(packing.num_hosts)]
    heapq.heapify(heap)
    for expert in np.repeat(order, missing_E[order]).tolist():
        host = _least_loaded(packing, expert, heap)
        if host is None:
            host = _make_room(packing, expert)
        if host is not None:
            packing.add(expert, host)
            heapq.heappush(heap, _entry(packing, host))


def _entry(packing: Packing, host: int) -> tuple[float, int, int]:
    """Return what orders hosts: load, then used memory, so that experts nobody wants spread too."""
    return float(packing.load_H[host]), int(packing.memory_H[host] - packing.free_H[host]), host


def _least_loaded(packing: Packing, expert: int, heap: list[tuple[float, int, int]]) -> int | None:
    """Return the host for one more replica. Entries of the heap that no longer hold are thrown away."""
    size = packing.bytes_E[expert]
    while heap and (heap[0] != _entry(packing, heap[0][2]) or packing.free_H[heap[0][2]] <= 0):
        heapq.heappop(heap)
    hosts = packing.hosts_of[expert]
    top = heap[0][2] if heap and not packing.is_layered else None
    if top is not None and packing.free_H[top] >= size and (not hosts or packing.num_on_node(expert, top) == 0):
        return top
    allowed_H = packing.free_H >= size
    allowed_H[hosts] = False
    fresh_H = allowed_H & ~np.isin(packing.node_H, packing.node_H[hosts])
    candidates = np.flatnonzero(fresh_H if fresh_H.any() else allowed_H)
    if not len(candidates):
        return None
    used = packing.memory_H[candidates] - packing.free_H[candidates]
    loads = packing.load_H[candidates]
    if packing.is_layered:
        loads = loads + packing.load_LH[packing.layer_E[expert], candidates]
    return int(candidates[np.lexsort((candidates, used, loads))[0]])


def _make_room(packing: Packing, expert: int) -> int | None:
    """Free a place for an expert that no host can take as it is; return the host, None if there is no way.

    The hosts with room may all hold the expert already: then another replica moves there. Or the free memory lies in
    pieces too small: then, for an expert that has no replica at all, one that others have twice is dropped.
    """
    size = packing.bytes_E[expert]
    by_load = np.lexsort((np.arange(packing.num_hosts), packing.load_H)).tolist()
    with_room = [host for host in packing.hosts_of[expert] if packing.free_H[host] > 0]
    for host in by_load:
        if host in packing.hosts_of[expert]:
            continue
        for other in sorted(packing.experts_on[host], key=lambda other: (packing.shares_E[other], other)):
            if packing.free_H[host] + packing.bytes_E[other] < size:
                continue
            for target in with_room:
                if packing.bytes_E[other] <= packing.free_H[target] and packing.may_go(other, host, target):
                    packing.remove(other, host)
                    packing.add(other, target)
                    return host
            if not packing.hosts_of[expert] and len(packing.hosts_of[other]) > 1:
                packing.remove(other, host)
                return host
    return None
