"""The load of hosts made even by few moves.

A host above its limit gives replicas to, or exchanges them with, the least loaded hosts, until it is at the goal
or nothing helps, as with one expert too large for any host. A move that suffices is preferred over an exchange, which
loads two experts; among equals the one that leaves the two hosts most alike.

Shape letters: E experts, H hosts.
"""

from typing import NamedTuple

import numpy as np

from dsmoe_ray.serving.packing import Packing

# Least loaded hosts that an overloaded one looks at first, and if none of them helps.
_NUM_PARTNERS = (12, 64)
# Best exchanges that are tried before a host counts as stuck.
_NUM_TRIES = 256
# What gains less, in mean loads or in the host's largest replicas, is not worth its bytes unless it suffices.
_LEAST_GAIN, _LEAST_GAIN_OF_LARGEST = 5e-3, 0.1
_MAX_ROUNDS = 2
_EMPTY = -1


class _Exchange(NamedTuple):
    """An expert moves from a source to a target, and another one, if any, back."""

    expert: int
    source: int
    target: int
    other: int = _EMPTY

    def reversed(self) -> "_Exchange":
        """Return what undoes it."""
        return _Exchange(self.expert, self.target, self.source, self.other)


def spread_over_nodes(packing: Packing) -> None:
    """Move replicas that share a node to hosts on other nodes, where there is room."""
    nodes = packing.node_H.tolist()
    num_nodes = len(set(nodes))
    for expert in np.flatnonzero(packing.counts_E > 1).tolist():
        hosts = packing.hosts_of[expert]
        while len({nodes[host] for host in hosts}) < min(len(hosts), num_nodes):
            allowed_H = packing.free_H >= packing.bytes_E[expert]
            candidates = np.flatnonzero(allowed_H & ~np.isin(packing.node_H, packing.node_H[hosts]))
            if not len(candidates):
                break
            target = int(candidates[np.argmin(packing.load_H[candidates])])
            crowded = [host for host in hosts if packing.num_on_node(expert, host) > 1]
            source = max(crowded, key=lambda host: (packing.load_H[host], -host))
            packing.remove(expert, source)
            packing.add(expert, target)


def balance(
    packing: Packing, trigger_H: np.ndarray, goal: float, *, layer: int | None = None, ceiling: float = np.inf
) -> None:
    """Bring every host whose load is above its trigger down to the goal, as far as moves and exchanges can.

    Once more changes nothing. The goal is at most any trigger. The distance between them is what may be chance: it
    moves no expert by itself, and relief that is smaller and does not reach the goal is not worth its bytes.

    Args:
        packing: The board to change.
        trigger_H: Loads above which hosts are relieved.
        goal: Load at which they are relieved enough.
        layer: Makes the load of this layer even; by default that of all layers together.
        ceiling: No host gets more load of all layers than this.
    """
    view = _View(packing, layer, goal, ceiling)
    for _ in range(_MAX_ROUNDS):
        has_changed = False
        is_stuck_H = np.zeros(packing.num_hosts, dtype=bool)
        while True:
            excess_H = np.where(is_stuck_H, -np.inf, view.loads - trigger_H)
            source = int(np.argmax(excess_H))
            if excess_H[source] <= 0:
                break
            # What was tried before on others may help now.
            has_changed |= _relieve(view, source, float(trigger_H[source])) and bool(is_stuck_H.any())
            is_stuck_H[source] = view.loads[source] > trigger_H[source]
        if not has_changed:
            break


class _View(NamedTuple):
    """What is to be made even."""

    packing: Packing
    layer: int | None
    goal: float
    ceiling: float

    @property
    def loads(self) -> np.ndarray:
        """Return the loads that count."""
        return self.packing.load_H if self.layer is None else self.packing.load_LH[self.layer]

    def experts_on(self, host: int) -> np.ndarray:
        """Return the experts of a host that count."""
        experts = self.packing.sorted_on(host)
        return experts if self.layer is None else experts[self.packing.layer_E[experts] == self.layer]


def _relieve(view: _View, source: int, trigger: float) -> bool:
    """Bring a host down to the goal; return whether anything changed."""
    before = view.loads[source]
    done: list[_Exchange] = []
    while view.loads[source] > view.goal:
        exchange = next(filter(None, (_find(view, source, num) for num in _NUM_PARTNERS)), None)
        if exchange is None:
            break
        _apply(view.packing, exchange)
        done.append(exchange)
    if view.loads[source] > view.goal and before - view.loads[source] < trigger - view.goal:
        for exchange in reversed(done):
            _apply(view.packing, exchange.reversed())
        return False
    return bool(done)


def _find(view: _View, source: int, num_partners: int) -> _Exchange | None:
    """Return the best move or exchange between a host and the least loaded ones, None if none is worth it."""
    packing, load_H, goal = view.packing, view.loads, view.goal
    own = view.experts_on(source)
    partners, others = _partners(view, source, num_partners)
    if not len(own) or not len(partners):
        return None
    other_shares = np.where(others == _EMPTY, 0.0, packing.shares_E[others])
    differences = packing.shares_E[own][:, None] - other_shares[None, :]
    after_source = load_H[source] - differences
    after_partner = load_H[partners][None, :] + differences
    higher = np.maximum(after_source, after_partner)
    least_gain = min(_LEAST_GAIN * float(load_H.mean()), _LEAST_GAIN_OF_LARGEST * float(packing.shares_E[own].max()))
    is_enough = (after_source <= goal) & (after_partner <= goal)
    useful = is_enough | (higher < load_H[source] - least_gain)
    other_bytes = np.where(others == _EMPTY, 0, packing.bytes_E[others])
    added_bytes = packing.bytes_E[own][:, None] - other_bytes[None, :]
    fits = (added_bytes <= packing.free_H[partners][None, :]) & (-added_bytes <= packing.free_H[source])
    fits &= _may_take(packing, source, own)[:, partners] & ~np.isin(others, packing.sorted_on(source))[None, :]
    fits &= packing.load_H[partners][None, :] + differences <= view.ceiling
    tier = np.where(is_enough, np.where(others == _EMPTY, 0, 1)[None, :], 2)
    if view.layer is None and packing.is_layered:
        higher = higher + _higher_of_layer(packing, source, own, (partners, others), differences)
    for position in _first_by(tier, higher, useful & fits):
        expert, column = int(own[position // len(partners)]), int(position % len(partners))
        exchange = _Exchange(expert, source, int(partners[column]), int(others[column]))
        if exchange.other == _EMPTY or packing.may_go(exchange.other, exchange.target, source):
            return exchange
    return None


def _higher_of_layer(
    packing: Packing, source: int, own: np.ndarray, pairs: tuple[np.ndarray, np.ndarray], differences: np.ndarray
) -> np.ndarray:
    """Return the higher of both hosts' loads of the moving expert's layer; of two layers at once, very high."""
    partners, others = pairs
    layers = packing.layer_E[own]
    at_source = packing.load_LH[layers, source][:, None] - differences
    at_partner = packing.load_LH[layers][:, partners] + differences
    is_other_layer = (others != _EMPTY)[None, :] & (packing.layer_E[others][None, :] != layers[:, None])
    return np.maximum(at_source, at_partner) + np.where(is_other_layer, packing.load_H.max(), 0.0)


def _partners(view: _View, source: int, num_partners: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the replicas to exchange with, as hosts and experts; an expert of -1 is free memory."""
    order = np.argsort(view.loads, kind="stable")[: num_partners + 1]
    hosts = [host for host in order.tolist() if host != source]
    held = [view.experts_on(host) for host in hosts]
    partners = np.concatenate([hosts, np.repeat(hosts, [len(experts) for experts in held])]).astype(np.int64)
    return partners, np.concatenate([np.full(len(hosts), _EMPTY), *held])


def _may_take(packing: Packing, source: int, experts: np.ndarray) -> np.ndarray:
    """Return for each of a host's experts which hosts its replica may move to: ``Packing.may_go`` for all at once."""
    node_H, node = packing.node_H, packing.node_H[source]
    allowed = np.ones((len(experts), packing.num_hosts), dtype=bool)
    for row, expert in enumerate(experts.tolist()):
        hosts = packing.hosts_of[expert]
        if len(hosts) > 1 and packing.num_on_node(expert, source) == 1:
            is_used = np.zeros(node_H.max() + 1, dtype=bool)
            is_used[node_H[hosts]] = True
            is_used[node] = False
            allowed[row] = ~is_used[node_H]
        allowed[row, hosts] = False
    return allowed


def _first_by(tier: np.ndarray, higher: np.ndarray, useful: np.ndarray) -> list[int]:
    """Return the best positions of the flattened matrices, best first."""
    positions = np.flatnonzero(useful)
    tiers, values = tier.ravel()[positions], higher.ravel()[positions]
    if len(positions) > _NUM_TRIES:
        scores = values + tiers * (values.max() + 1)
        kept = np.argpartition(scores, _NUM_TRIES)[:_NUM_TRIES]
        positions, tiers, values = positions[kept], tiers[kept], values[kept]
    return positions[np.lexsort((positions, values, tiers))].tolist()


def _apply(packing: Packing, exchange: _Exchange) -> None:
    """Move the one expert, and the other one back if there is one."""
    if exchange.other != _EMPTY:
        packing.remove(exchange.other, exchange.target)
        packing.add(exchange.other, exchange.source)
    packing.remove(exchange.expert, exchange.source)
    packing.add(exchange.expert, exchange.target)
