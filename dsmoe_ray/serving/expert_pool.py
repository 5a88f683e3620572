"""Which experts of an artifact are in memory: read when they are wanted, let go when others need the room.

Memory is counted in experts. An expert that is being read has its room already; one that somebody computes with is
pinned and stays. When room is needed, the one that was used longest ago goes: first among those that nobody ordered to
be here, then, for a token that waits, among all. Reading goes on in the caller's thread, outside the lock.

Shape suffixes: L layers, E experts.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from dsmoe_ray.artifact.load import Artifact
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.model.config import MoeConfig
from dsmoe_ray.serving.expert_memory import CopiedExperts, ExpertMemory, MappedExperts, count_expert_bytes
from dsmoe_ray.serving.plan import LogicalExpert


class PoolCounts(NamedTuple):
    """What a pool has done since it began."""

    num_read: int
    read_s: float
    num_dropped: int


class ExpertPool:
    """The experts of one artifact, as many in memory as fit."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        memory_bytes: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        now_s: Callable[[], float] = monotonic_s,
    ) -> None:
        """Hold nothing yet.

        Args:
            artifact: Whose experts.
            memory_bytes: Most that experts may take; by default as much as all of them.
            dtype: What they compute in; by default what is stored, which is then used where it lies.
            device: Where they compute; by default the CPU.
            now_s: The clock of last use.

        Raises:
            ConfigError: the model has no experts, or not one of them fits.
        """
        config, device = artifact.model_config, device or torch.device("cpu")
        if not isinstance(config.ffn, MoeConfig):
            raise ConfigError(
                f"{artifact.directory} is a model with a dense FFN: it has no experts to host. Use hosts.count: 0."
            )
        self.config, self.num_layers, self.num_experts = config, config.num_layers, config.ffn.num_experts
        stored = artifact.view_experts(0)["w1"].dtype
        self.dtype = dtype or stored
        self.expert_bytes = count_expert_bytes(config, self.dtype)
        self.capacity = _count_fitting(memory_bytes, self.expert_bytes, self.num_layers * self.num_experts)
        """Most experts that are here at once."""
        self.memory: ExpertMemory
        if self.dtype == stored and device.type == "cpu":
            self.memory = MappedExperts(artifact)
        else:
            self.memory = CopiedExperts(artifact, num_slots=self.capacity, dtype=self.dtype, device=device)
        self._now_s = now_s
        self._changed = threading.Condition()
        """Guards all that follows; notified when something was read, dropped or is no longer in use."""
        shape = self.num_layers, self.num_experts
        self._held_LE, self._ordered_LE = np.zeros(shape, bool), np.zeros(shape, bool)
        self._pins_LE, self._last_used_LE = np.zeros(shape, np.int32), np.zeros(shape)
        self._reading: set[LogicalExpert] = set()
        self._num_held = self._num_read = self._num_dropped = 0
        self._read_s = 0.0

    def pin(self, layer: int, wanted_E: np.ndarray) -> np.ndarray | None:
        """Keep experts of a layer here until ``unpin`` if all are here; else return the ids of those missing.

        Args:
            layer: Whose experts.
            wanted_E: bool.
        """
        with self._changed:
            missing_E = wanted_E > self._held_LE[layer]
            # Faster than any().
            if np.count_nonzero(missing_E):
                return np.flatnonzero(missing_E)
            self._pins_LE[layer] += wanted_E
            np.putmask(self._last_used_LE[layer], wanted_E, self._now_s())
        return None

    def unpin(self, layer: int, wanted_E: np.ndarray) -> None:
        """Undo one ``pin`` that lacked none."""
        with self._changed:
            self._pins_LE[layer] -= wanted_E
            if self._num_held + len(self._reading) >= self.capacity:
                # Somebody may wait for room.
                self._changed.notify_all()

    @contextmanager
    def pinned(self, layer: int, expert_ids: Iterable[int]) -> Iterator[None]:
        """Read what is missing of a few experts of a layer and keep them here meanwhile.

        Who holds some and waits for others may be waited for in turn: all threads together must want at most
        ``capacity`` experts at a time in this way.

        Raises:
            ArtifactError: one cannot be read.
        """
        held: list[LogicalExpert] = []
        try:
            for expert_id in expert_ids:
                expert = LogicalExpert(layer, int(expert_id))
                self._read(expert, for_token=True, pins=1)
                held.append(expert)
            yield
        finally:
            with self._changed:
                for expert in held:
                    self._pins_LE[expert] -= 1
                self._changed.notify_all()

    def read(self, expert: LogicalExpert) -> bool:
        """Bring an expert here because somebody ordered it; False if others that were ordered leave no room.

        Raises:
            ArtifactError: it cannot be read.
        """
        return self._read(expert, for_token=False, pins=0)

    def order(self, experts: Iterable[LogicalExpert]) -> list[LogicalExpert]:
        """Keep exactly these when others need room; return those of them that are not here."""
        ordered_LE = np.zeros_like(self._ordered_LE)
        for expert in experts:
            ordered_LE[expert] = True
        with self._changed:
            self._ordered_LE = ordered_LE
            return _list_experts(ordered_LE & ~self._held_LE)

    def drop_idle(self, idle_s: float) -> None:
        """Let go of what nobody ordered and nobody has used for so long."""
        with self._changed:
            idle_LE = self._held_LE & ~self._ordered_LE & (self._pins_LE == 0)
            idle_LE &= self._last_used_LE <= self._now_s() - idle_s
            for expert in _list_experts(idle_LE):
                self._drop(expert)
            self._changed.notify_all()

    @property
    def held(self) -> list[LogicalExpert]:
        """Return the experts that are here."""
        with self._changed:
            return _list_experts(self._held_LE)

    @property
    def counts(self) -> PoolCounts:
        """Return what was done so far."""
        with self._changed:
            return PoolCounts(self._num_read, self._read_s, self._num_dropped)

    def _read(self, expert: LogicalExpert, *, for_token: bool, pins: int) -> bool:
        with self._changed:
            while True:
                if self._held_LE[expert]:
                    self._pins_LE[expert] += pins
                    self._last_used_LE[expert] = self._now_s()
                    return True
                if expert not in self._reading and self._make_room(for_token=for_token):
                    break
                if expert not in self._reading and not for_token:
                    return False
                self._changed.wait()
            self._reading.add(expert)
        began_s = self._now_s()
        is_here = False
        try:
            self.memory.read(expert)
            is_here = True
        finally:
            with self._changed:
                self._reading.discard(expert)
                if is_here:
                    self._add(expert, pins, began_s)
                self._changed.notify_all()
        return True

    def _add(self, expert: LogicalExpert, pins: int, began_s: float) -> None:
        self._held_LE[expert] = True
        self._pins_LE[expert] += pins
        self._last_used_LE[expert] = now_s = self._now_s()
        self._num_held += 1
        self._num_read += 1
        self._read_s += now_s - began_s

    def _make_room(self, *, for_token: bool) -> bool:
        """Let go of one expert if all room is taken; return whether there is room for one now."""
        if self._num_held + len(self._reading) < self.capacity:
            return True
        free_LE = self._held_LE & (self._pins_LE == 0)
        unordered_LE = free_LE & ~self._ordered_LE
        candidates_LE = unordered_LE if unordered_LE.any() or not for_token else free_LE
        if not candidates_LE.any():
            return False
        oldest = np.where(candidates_LE, self._last_used_LE, np.inf).argmin()
        self._drop(LogicalExpert(*divmod(int(oldest), self.num_experts)))
        return True

    def _drop(self, expert: LogicalExpert) -> None:
        self._held_LE[expert] = False
        self._num_held -= 1
        self._num_dropped += 1
        self.memory.drop(expert)


def _list_experts(mask_LE: np.ndarray) -> list[LogicalExpert]:
    layers, expert_ids = np.nonzero(mask_LE)
    return [LogicalExpert(*pair) for pair in zip(layers.tolist(), expert_ids.tolist(), strict=True)]


def _count_fitting(memory_bytes: int | None, expert_bytes: int, num_experts: int) -> int:
    if memory_bytes is None:
        return num_experts
    if memory_bytes < expert_bytes:
        raise ConfigError(
            f"hosts.memory_bytes={memory_bytes} does not hold one expert, which takes {expert_bytes} bytes. Give more."
        )
    return min(memory_bytes // expert_bytes, num_experts)
