"""The load of hosts made even by few moves.

A host above its limit gives replicas to, or exchanges them with, the least loaded hosts, until it is within the limit
or nothing helps, as with one expert too large for any host. A move that suffices is preferred over an exchange, which
loads two experts; among equals the one that leaves the two hosts most alike.

Shape letters: E experts, H hosts.
"""

import numpy as np

from dsmoe_ray.serving.packing import Packing

# Least loaded hosts that an overloaded one looks at.
_NUM_PARTNERS = 32
# Best exchanges that are tried before a host counts as stuck.
_NUM_TRIES = 64
# What gains less, in mean loads, is not worth its bytes.
_LEAST_GAIN = 1e-3
_EMPTY = -1


def spread_over_nodes(packing: Packing) -> None:
    """Move replicas that share a node to hosts on other nodes, where there is room."""
    num_nodes = len(np.unique(packing.node_H))
    for expert, hosts in enumerate(packing.hosts_of):
        if len(hosts) < 2 or num_nodes < 2:
            continue
        while len({int(packing.node_H[host]) for host in hosts}) < min(len(hosts), num_nodes):
            allowed_H = packing.free_H >= packing.bytes_E[expert]
            candidates = np.flatnonzero(allowed_H & ~np.isin(packing.node_H, packing.node_H[hosts]))
            if not len(candidates):
                break
            target = int(candidates[np.argmin(packing.load_H[candidates])])
            crowded = [host for host in hosts if packing.num_on_node(expert, host) > 1]
            source = max(crowded, key=lambda host: (packing.load_H[host], -host))
            packing.remove(expert, source)
            packing.add(expert, target)


def balance(packing: Packing, limit_H: np.ndarray) -> None:
    """Bring every host within its limit, as far as moves and exchanges can."""
    is_stuck_H = np.zeros(packing.num_hosts, dtype=bool)
    while True:
        excess_H = np.where(is_stuck_H, -np.inf, packing.load_H - limit_H)
        source = int(np.argmax(excess_H))
        if excess_H[source] <= 0:
            return
        is_stuck_H[source] = not _relieve(packing, source, limit_H)


def _relieve(packing: Packing, source: int, limit_H: np.ndarray) -> bool:
    """Make the best move or exchange between a host and the least loaded ones; return whether there was any."""
    own = np.array(sorted(packing.experts_on[source]), dtype=np.int64)
    partners, others = _partners(packing, source)
    if not len(own) or not len(partners):
        return False
    other_shares = np.where(others == _EMPTY, 0.0, packing.shares_E[others])
    differences = packing.shares_E[own][:, None] - other_shares[None, :]
    after_source = packing.load_H[source] - differences
    after_partner = packing.load_H[partners][None, :] + differences
    higher = np.maximum(after_source, after_partner)
    mean = float(packing.load_H.mean())
    useful = higher < packing.load_H[source] - _LEAST_GAIN * mean
    is_enough = (after_source <= limit_H[source]) & (after_partner <= limit_H[partners][None, :])
    tier = np.where(is_enough, np.where(others == _EMPTY, 0, 1)[None, :], 2)
    order = _first_by(tier, higher, useful)
    for position in order:
        expert, column = int(own[position // len(partners)]), int(position % len(partners))
        if _try_exchange(packing, source, int(partners[column]), expert, int(others[column])):
            return True
    return False


def _partners(packing: Packing, source: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the replicas to exchange with, as hosts and experts; an expert of -1 is free memory."""
    order = np.lexsort((np.arange(packing.num_hosts), packing.load_H))[: _NUM_PARTNERS + 1].tolist()
    pairs: list[tuple[int, int]] = []
    for host in order:
        if host != source:
            pairs.append((host, _EMPTY))
            pairs.extend((host, expert) for expert in sorted(packing.experts_on[host]))
    array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _first_by(tier: np.ndarray, higher: np.ndarray, useful: np.ndarray) -> list[int]:
    """Return the best positions of the flattened matrices, best first."""
    positions = np.flatnonzero(useful)
    tiers, values = tier.ravel()[positions], higher.ravel()[positions]
    order = np.lexsort((positions, values, tiers))[:_NUM_TRIES]
    return positions[order].tolist()


def _try_exchange(packing: Packing, source: int, target: int, expert: int, other: int) -> bool:
    """Move ``expert`` to the target and ``other`` back, if memory and the rules of replicas allow it."""
    size = packing.bytes_E[expert]
    returned = 0 if other == _EMPTY else packing.bytes_E[other]
    if packing.free_H[target] + returned < size or packing.free_H[source] + size < returned:
        return False
    if not packing.may_go(expert, source, target):
        return False
    if other != _EMPTY:
        if not packing.may_go(other, target, source):
            return False
        packing.remove(other, target)
        packing.add(other, source)
    packing.remove(expert, source)
    packing.add(expert, target)
    return True
