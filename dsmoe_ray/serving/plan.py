"""Which host holds which experts: the plan that the controller publishes and everyone else obeys. Pure data.

Plans are totally ordered by their version; a process that knows a newer one tells it to a process that does not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class LogicalExpert(NamedTuple):
    """One FFN expert of one layer, wherever its replicas live."""

    layer: int
    expert_id: int


@dataclass(frozen=True, kw_only=True)
class HostInfo:
    """One process that serves experts, and how to reach it."""

    host_id: str
    """Never used again once its process is gone."""
    addresses: tuple[str, ...]
    """Best first, such as ``unix:///tmp/x.sock`` and ``grpc://127.0.0.1:1234``; see ``wire/connection.py``."""
    node_id: str
    """Equal for processes that share a machine."""
    memory_bytes: int
    """Most that its experts may take."""


@dataclass(frozen=True, kw_only=True)
class PlacementPlan:
    """Where the replicas of every logical expert live."""

    version: int
    hosts: Mapping[str, HostInfo] = field(default_factory=dict)
    """By host id."""
    replicas: Mapping[LogicalExpert, tuple[str, ...]] = field(default_factory=dict)
    """Ids of the hosts that hold an expert, each once. Every expert has at least one while there is any host."""
    cold: frozenset[LogicalExpert] = frozenset()
    """Experts scaled to zero: the one host named for each reads it from disk when a token wants it."""

    def hosts_of(self, expert: LogicalExpert) -> tuple[HostInfo, ...]:
        """Return the hosts that hold an expert."""
        return tuple(self.hosts[host_id] for host_id in self.replicas.get(expert, ()))

    def held_by(self, host_id: str) -> frozenset[LogicalExpert]:
        """Return the experts that a host holds."""
        return frozenset(expert for expert, host_ids in self.replicas.items() if host_id in host_ids)
