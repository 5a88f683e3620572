"""Which rank answers for which copy of a tensor, when several hold the same part. Pure arithmetic on the mesh.

Every rank reaches the same answer without asking the others, so a checkpoint is written once without a collective.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class Chunk(NamedTuple):
    """A contiguous part of a tensor, and its place in the whole."""

    tensor: torch.Tensor
    offsets: torch.Size
    global_size: torch.Size


def rank_in(mesh: DeviceMesh) -> int:
    """Return this rank's index in a mesh, counted along its axes with the last running fastest."""
    return _position([(mesh, axis) for axis in range(mesh.ndim)])[0]


def plan_chunks(tensors: Mapping[str, torch.Tensor], mesh: DeviceMesh | None) -> dict[str, Chunk]:
    """Choose what this rank writes, so that over all ranks every element is written once and the load is even.

    Every rank reaches the same choice without asking, because it depends on names, global sizes and the mesh only.
    """
    copies = {name: _copy_of(tensor, mesh) for name, tensor in tensors.items()}
    loads: dict[int, list[int]] = {}
    chunks = {}
    for name in sorted(tensors, key=lambda name: (-tensors[name].numel(), name)):
        tensor, (index, num_copies) = tensors[name], copies[name]
        load = loads.setdefault(num_copies, [0] * num_copies)
        owner = load.index(min(load))
        load[owner] += tensor.numel() * tensor.element_size()
        chunk = _local_chunk(tensor)
        if owner == index and chunk.tensor.numel() > 0:
            chunks[name] = chunk
    return chunks


def _local_chunk(tensor: torch.Tensor) -> Chunk:
    if not isinstance(tensor, DTensor):
        return Chunk(tensor, torch.Size([0] * tensor.dim()), tensor.shape)
    [place] = tensor.__create_chunk_list__()
    return Chunk(tensor.to_local(), place.offsets, tensor.shape)


def _copy_of(tensor: torch.Tensor, mesh: DeviceMesh | None) -> tuple[int, int]:
    """Return which of how many equal copies of this rank's chunk it holds, over the whole world."""
    axes: list[tuple[DeviceMesh, int]] = []
    if isinstance(tensor, DTensor):
        own = tensor.device_mesh
        axes += [(own, axis) for axis, placement in enumerate(tensor.placements) if placement.is_replicate()]
        if mesh is not None:
            axes += [(mesh, axis) for axis in _axes_outside(own, mesh)]
        elif own.size() > 1:
            raise ValueError("a state with tensors sharded over ranks needs the mesh of the run to be saved")
    elif mesh is not None:
        axes += [(mesh, axis) for axis in range(mesh.ndim)]
    return _position(axes)


def _position(axes: Sequence[tuple[DeviceMesh, int]]) -> tuple[int, int]:
    """Return this rank's index along several axes taken together, the last running fastest, and their size."""
    index, size = 0, 1
    for mesh, axis in axes:
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"this rank is not in the mesh {mesh}")
        index = index * mesh.size(axis) + coordinate[axis]
        size *= mesh.size(axis)
    return index, size


def _axes_outside(own: DeviceMesh, mesh: DeviceMesh) -> list[int]:
    """Return the axes of the run's mesh along which a tensor's own mesh does not extend: it is repeated there."""
    members = torch.isin(mesh.mesh, own.mesh)
    extents = [torch.unique(members.nonzero()[:, axis]).numel() for axis in range(mesh.ndim)]
    return [axis for axis, extent in enumerate(extents) if extent == 1 and mesh.size(axis) > 1]
