"""The board on which replicas are packed onto hosts: experts and hosts are numbers, and sums are kept up to date.

It decides nothing: ``fitting.py`` and ``balancing.py`` change it, ``placement.py`` turns plans into it and back.

Shape letters: E experts, H hosts.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

# With fewer, single experts are too large a part of a host's load of one layer.
_EXPERTS_OF_A_LAYER_PER_HOST = 4


class Packing:
    """Which host holds which experts at the moment, and what that makes of loads and memory."""

    def __init__(
        self,
        *,
        loads_E: np.ndarray,
        bytes_E: np.ndarray,
        memory_H: np.ndarray,
        node_H: np.ndarray,
        hosts_of: Sequence[Iterable[int]],
        layer_E: np.ndarray,
    ) -> None:
        """Take the replicas as they are; ``hosts_of`` names each expert's hosts, ``layer_E`` its layer's number."""
        self.loads_E, self.bytes_E = loads_E, bytes_E
        self.memory_H, self.node_H = memory_H, node_H
        self._nodes: list[int] = node_H.tolist()
        self.hosts_of: list[list[int]] = [list(hosts) for hosts in hosts_of]
        self.experts_on: list[set[int]] = [set() for _ in memory_H]
        self._sorted_on: list[np.ndarray | None] = [None] * len(memory_H)
        self.free_H = memory_H.copy()
        self.num_changes = 0
        self.changed: set[int] = set()
        """Experts that were put on or taken off a host."""
        self.load_H = np.zeros(len(memory_H))
        self.layer_E = layer_E
        self.num_layers = int(layer_E.max(initial=-1)) + 1
        self.load_LH = np.zeros((self.num_layers, len(memory_H)))
        """Load of each host by layer."""
        self.shares_E = np.zeros(len(loads_E))
        self.counts_E = np.fromiter(map(len, self.hosts_of), dtype=np.int64, count=len(self.hosts_of))
        """Replicas of each expert."""
        self._host_of_replica: np.ndarray | None = None
        for expert, hosts in enumerate(self.hosts_of):
            for host in hosts:
                self.experts_on[host].add(expert)
        self.free_H -= self.sum_over_hosts(bytes_E).astype(np.int64)
        self.share_out(self.counts_E)

    @property
    def num_hosts(self) -> int:
        """Return the number of hosts."""
        return len(self.memory_H)

    def sum_over_hosts(self, values_E: np.ndarray) -> np.ndarray:
        """Return for each host the sum of a value over the experts that it holds."""
        if self._host_of_replica is None:
            total = int(self.counts_E.sum())
            self._host_of_replica = np.fromiter(chain.from_iterable(self.hosts_of), dtype=np.int64, count=total)
        weights = np.repeat(values_E, self.counts_E)
        # Without any replica numpy returns integers.
        return np.bincount(self._host_of_replica, weights=weights, minlength=self.num_hosts).astype(np.float64)

    def sum_over_cells(self, values_E: np.ndarray) -> np.ndarray:
        """Return for each layer and host the sum of a value over the experts of that layer that it holds."""
        self.sum_over_hosts(values_E)
        cells = np.repeat(self.layer_E, self.counts_E) * self.num_hosts + self._host_of_replica
        weights = np.repeat(values_E, self.counts_E)
        sums = np.bincount(cells, weights=weights, minlength=self.num_layers * self.num_hosts)
        return sums.astype(np.float64).reshape(self.num_layers, self.num_hosts)

    @property
    def is_layered(self) -> bool:
        """Return whether layers have enough experts to be shared out evenly one by one."""
        num_cells = self.num_layers * self.num_hosts
        return 1 < self.num_layers and _EXPERTS_OF_A_LAYER_PER_HOST * num_cells <= len(self.loads_E)

    def share_out(self, counts_E: np.ndarray) -> None:
        """Give every replica an equal share of its expert's load, as if there were ``counts_E`` of them."""
        self.shares_E = self.loads_E / np.maximum(counts_E, 1)
        self.load_H = self.sum_over_hosts(self.shares_E)
        if self.is_layered:
            self.load_LH = self.sum_over_cells(self.shares_E)

    def sorted_on(self, host: int) -> np.ndarray:
        """Return the experts of a host in ascending order."""
        known = self._sorted_on[host]
        if known is None:
            known = self._sorted_on[host] = np.array(sorted(self.experts_on[host]), dtype=np.int64)
        return known

    def add(self, expert: int, host: int) -> None:
        """Put a replica onto a host."""
        self.hosts_of[expert].append(host)
        self.experts_on[host].add(expert)
        self._sorted_on[host] = None
        self._note_change(expert, 1)
        self.free_H[host] -= self.bytes_E[expert]
        self.load_H[host] += self.shares_E[expert]
        self.load_LH[self.layer_E[expert], host] += self.shares_E[expert]

    def remove(self, expert: int, host: int) -> None:
        """Take a replica off a host."""
        self.hosts_of[expert].remove(host)
        self.experts_on[host].remove(expert)
        self._sorted_on[host] = None
        self._note_change(expert, -1)
        self.free_H[host] += self.bytes_E[expert]
        self.load_H[host] -= self.shares_E[expert]
        self.load_LH[self.layer_E[expert], host] -= self.shares_E[expert]

    def _note_change(self, expert: int, difference: int) -> None:
        self.counts_E[expert] += difference
        self.num_changes += 1
        self.changed.add(expert)
        self._host_of_replica = None

    def num_on_node(self, expert: int, host: int) -> int:
        """Return how many replicas of an expert share the node of a host."""
        node = self._nodes[host]
        return sum(self._nodes[other] == node for other in self.hosts_of[expert])

    def may_go(self, expert: int, source: int, target: int) -> bool:
        """Return whether a replica may move: no second one on a host, and not onto fewer nodes."""
        if target in self.hosts_of[expert]:
            return False
        if self._nodes[source] == self._nodes[target] or self.num_on_node(expert, target) == 0:
            return True
        return self.num_on_node(expert, source) > 1
