"""Where the weights of an artifact's experts lie while someone computes with them.

Mapped: where they are in the artifact's files, all experts of a layer side by side, so that one expert comes and goes
by its pages alone. Copied: in a fixed number of slots, in another type than the stored one or on a GPU. Neither decides
which experts are here; see ``expert_pool.py``.

Shape suffixes: L layers, E experts, F width of one expert, D model width, T tokens of a call, K experts that a token
names.
"""

import mmap
from typing import Protocol

import numpy as np
import torch

from dsmoe_ray.artifact.layout import expert_matrices
from dsmoe_ray.artifact.load import Artifact
from dsmoe_ray.inference.sparse_experts import StackedWeights
from dsmoe_ray.model.config import ModelConfig, MoeConfig
from dsmoe_ray.serving.plan import LogicalExpert


class ExpertMemory(Protocol):
    """Weights of experts, to be read in and let go one by one."""

    layers: list[StackedWeights]
    """What to compute with."""

    def read(self, expert: LogicalExpert) -> None:
        """Bring one expert here from disk, verified; takes long.

        Raises:
            ArtifactError: it does not match its digest, or cannot be read.
        """

    def drop(self, expert: LogicalExpert) -> None:
        """Let go of one expert, with which nobody computes now."""

    def locate(self, layer: int, expert_ids_TK: np.ndarray) -> tuple[int, np.ndarray]:
        """Return under which layer of ``layers`` and which ids experts are found here; -1 stays -1."""


class MappedExperts:
    """Experts in the mapped files of their artifact."""

    def __init__(self, artifact: Artifact) -> None:
        """Map everything, and read nothing."""
        self._artifact = artifact
        views = [artifact.view_experts(layer) for layer in range(artifact.model_config.num_layers)]
        self.layers = [StackedWeights(view["w1"], view["w2"], view.get("w3")) for view in views]

    def read(self, expert: LogicalExpert) -> None:
        """Verify an expert when it comes for the first time; then look at each of its pages, so that all are here."""
        [matrices] = self._artifact.load_experts(expert.layer, [expert.expert_id]).values()
        for matrix_FD in matrices.values():
            # PyTorch lets other threads run meanwhile, as long as a disk may take.
            matrix_FD.flatten().view(torch.uint8)[:: mmap.PAGESIZE].sum()

    def drop(self, expert: LogicalExpert) -> None:
        """Give its pages back."""
        self._artifact.release_expert(*expert)

    def locate(self, layer: int, expert_ids_TK: np.ndarray) -> tuple[int, np.ndarray]:
        """Return what is given: all layers are here, all experts in their order."""
        return layer, expert_ids_TK


class CopiedExperts:
    """Experts in slots of their own, in any type and on any device; only those in a slot take memory."""

    def __init__(self, artifact: Artifact, *, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take memory for ``num_slots`` experts."""
        config = artifact.model_config
        assert isinstance(config.ffn, MoeConfig)
        self._artifact = artifact
        shape = (num_slots, config.ffn.d_ff, config.d_model)
        self._slots = {matrix: torch.zeros(shape, dtype=dtype, device=device) for matrix in expert_matrices(config)}
        self.layers = [StackedWeights(self._slots["w1"], self._slots["w2"], self._slots.get("w3"))]
        self._free = list(range(num_slots))
        # The last column is what an id of -1 finds.
        self._slot_of_LE = np.full((config.num_layers, config.ffn.num_experts + 1), -1, np.int32)

    def read(self, expert: LogicalExpert) -> None:
        """Verify an expert and copy it to a free slot."""
        [matrices] = self._artifact.load_experts(expert.layer, [expert.expert_id]).values()
        slot = self._free.pop()
        for matrix, stored_FD in matrices.items():
            self._slots[matrix][slot].copy_(stored_FD)
        self._artifact.release_expert(*expert)
        self._slot_of_LE[expert] = slot

    def drop(self, expert: LogicalExpert) -> None:
        """Free its slot."""
        self._free.append(int(self._slot_of_LE[expert]))
        self._slot_of_LE[expert] = -1

    def locate(self, layer: int, expert_ids_TK: np.ndarray) -> tuple[int, np.ndarray]:
        """Return the slots."""
        return 0, self._slot_of_LE[layer][expert_ids_TK]


def count_expert_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the memory of one FFN expert."""
    return len(expert_matrices(config)) * config.ffn.d_ff * config.d_model * dtype.itemsize
