"""Tensors of a run to files and back: asynchronous, sharded, loadable on any number of ranks.

Every rank writes its part with ``torch.distributed.checkpoint`` as if it were alone: a chunk of each tensor, with its
place in the whole. Which of several equal copies is written, and by whom, each rank works out from the mesh alone, so a
save runs no collective: it cannot hang on a dead peer, needs no process group and pickles nothing over a socket. A
reader merges the metadata of all parts and takes from each what its own ranks need.

The background thread touches only copies. Files are checked against their digests before torch reads any of them,
because DCP metadata is pickle. ``checkpoint_commit.py`` makes the parts a checkpoint.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh

from dsmoe_ray.durable import delete_directory, digest_file, sync_directory
from dsmoe_ray.errors import CheckpointError
from dsmoe_ray.parallel.ownership import Chunk, plan_chunks, rank_in
from dsmoe_ray.training.checkpoint_commit import WrittenPart, staging_path
from dsmoe_ray.training.checkpoint_store import CheckpointManifest, read_manifest, verify_file

State = dict[str, Any]
"""Nested dictionaries of tensors (plain or DTensor) and plain numbers, with string keys."""


class SaveHandle:
    """A save that runs in the background."""

    def __init__(self, future: "Future[WrittenPart]") -> None:
        self._future = future

    def done(self) -> bool:
        """Return whether the save has finished or failed."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> WrittenPart:
        """Wait for the files of this rank and return what was written.

        Raises:
            CheckpointError: the files could not be written.
            TimeoutError: the save still runs after ``timeout_s``.
        """
        return self._future.result(timeout_s)


class CheckpointWriter:
    """Saves the state of one rank, one save at a time."""

    def __init__(self, directory: Path, *, mesh: DeviceMesh | None = None) -> None:
        """Keep saves under ``directory``; ``mesh`` spans all ranks of the run, None means that this is the only one."""
        self._directory = directory
        self._mesh = mesh
        self._rank = 0 if mesh is None else rank_in(mesh)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._staging: dict[str, torch.Tensor] = {}
        self._last: Future[WrittenPart] | None = None

    def start_save(self, state: State, *, step: int) -> SaveHandle:
        """Copy the state and write the copy in the background.

        All ranks call it with states of equal names and global shapes; plain tensors are equal on all of them. Blocks
        for the copy only, unless the previous save still runs: then it waits, since two would hold two copies.

        Args:
            state: What to save; may change as soon as this returns.
            step: Names the checkpoint.
        """
        if self._last is not None:
            # A failure belongs to whoever holds the handle of that save.
            self._last.exception()
        tensors, values = _split(state)
        chunks = self._copy(plan_chunks(tensors, self._mesh))
        part = WrittenPart(
            rank=self._rank,
            files={},
            num_elements=sum(chunk.tensor.numel() for chunk in chunks.values()),
            num_elements_total=sum(tensor.numel() for tensor in tensors.values()),
            values=values,
        )
        self._last = self._pool.submit(_write_part, staging_path(self._directory, step), chunks, part)
        return SaveHandle(self._last)

    def close(self) -> None:
        """Wait for the save in progress and release the thread."""
        self._pool.shutdown(wait=True)

    def _copy(self, chunks: Mapping[str, Chunk]) -> dict[str, Chunk]:
        """Copy chunks to memory kept from save to save: fresh pages would cost more than the copy."""
        on_gpu = any(chunk.tensor.is_cuda for chunk in chunks.values())
        staging = {}
        for name, chunk in chunks.items():
            tensor = chunk.tensor
            buffer = self._staging.get(name)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            staging[name] = buffer.copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()
        self._staging = staging
        return {name: chunk._replace(tensor=staging[name]) for name, chunk in chunks.items()}


def collect_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> State:
    """Return the tensors of a model and its optimizer by name: the live ones, so loading into them restores both.

    Hyper-parameters of the optimizer are not part of the state: they come from the configuration and the schedule.
    """
    state: State = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = {
            f"{name}.{entry}": tensor
            for name, entries in _optimizer_entries(model, optimizer).items()
            for entry, tensor in entries.items()
        }
    return state


def load_checkpoint(path: Path, state: State) -> CheckpointManifest:
    """Load a checkpoint into the tensors and plain numbers of ``state``, in place, and return its manifest.

    Each rank calls it on its own; it may have been saved on any number of ranks. Only files that this rank needs are
    read, each after its digest was checked. A top-level section that ``state`` lacks stays unread.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint holds other names, shapes or types; names them.
    """
    reader = _VerifiedReader(path)
    tensors, values = _split(state)
    metadata = reader.read_metadata()
    _check_fits(path, metadata, tensors)
    missing = sorted(values.keys() - reader.manifest.values.keys())
    if missing:
        raise CheckpointError(f"{path} holds no value for {_few(missing)}. It was saved by another kind of run.")
    _read_into(reader, metadata, tensors)
    for name, container, key, leaf in _walk(state):
        if not isinstance(leaf, torch.Tensor):
            container[key] = reader.manifest.values[name]
    return reader.manifest


def read_model_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's tensors whole, layer by layer, in one process; memory is bounded by the largest tensor.

    Raises:
        CheckpointError: a file is damaged; names it.
    """
    reader = _VerifiedReader(path)
    metadata = reader.read_metadata()
    names = [name for name in metadata.state_dict_metadata if name.startswith("model.")]
    for name in sorted(names, key=_natural):
        entry: Any = metadata.state_dict_metadata[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        _check_fits(path, metadata, {name: tensor}, whole_sections=False)
        _read_into(reader, metadata, {name: tensor})
        yield name.removeprefix("model."), tensor


def _write_part(staging: Path, chunks: Mapping[str, Chunk], part: WrittenPart) -> WrittenPart:
    directory = staging / f"rank-{part.rank:05d}"
    try:
        # An earlier attempt at this step may have left files.
        delete_directory(directory)
        directory.mkdir(parents=True)
        _write_chunks(directory, chunks)
        sync_directory(directory)
        files = {f"{directory.name}/{file.name}": digest_file(file) for file in sorted(directory.iterdir())}
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as RuntimeError.
        raise CheckpointError(f"cannot write {directory}: {error}. Make room there, or change run.dir.") from error
    return dataclasses.replace(part, files=files)


def _write_chunks(directory: Path, chunks: Mapping[str, Chunk]) -> None:
    planner = _ChunkSavePlanner(chunks)
    # No copying ahead: the chunks are in host memory already, and that path would open a CUDA stream here.
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0)
    planner.set_up_planner({}, writer.storage_meta(), is_coordinator=True)
    writer.set_up_storage_writer(True)
    local_plan = writer.prepare_local_plan(planner.create_local_plan())
    plans, metadata = planner.create_global_plan([local_plan])
    [plan] = writer.prepare_global_plan(plans)
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [results])


class _ChunkSavePlanner(DefaultSavePlanner):
    """Describes chunks to DCP as shards of their tensors."""

    def __init__(self, chunks: Mapping[str, Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._chunks = chunks

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_to_write_item(name, chunk) for name, chunk in self._chunks.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> torch.Tensor:
        return self._chunks[index.fqn].tensor


def _to_write_item(name: str, chunk: Chunk) -> WriteItem:
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=chunk.offsets, sizes=chunk.tensor.shape),
        properties=TensorProperties(dtype=chunk.tensor.dtype),
        size=chunk.global_size,
    )
    return WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)


class _VerifiedReader(FileSystemReader):
    """Reads the parts of all ranks as one checkpoint; checks the digest of each file before it is first read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.manifest = read_manifest(path)
        self._directory = path
        self._verified: set[str] = set()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        merged = Metadata(state_dict_metadata={}, storage_data={})
        for name in self.manifest.files:
            if name.endswith("/.metadata"):
                self._verify(name)
                part = Path(name).parent
                _merge_part(merged, str(part), FileSystemReader(self._directory / part).read_metadata())
        return merged

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "torch.futures.Future[None]":
        for name in sorted({self.storage_data[item.storage_index].relative_path for item in plan.items}):
            self._verify(name)
        return super().read_data(plan, planner)

    def _verify(self, name: str) -> None:
        if name in self._verified:
            return
        if name not in self.manifest.files:
            raise CheckpointError(f"{self._directory / name} is not in the manifest; it is not read.")
        verify_file(self._directory, name, self.manifest.files[name])
        self._verified.add(name)


def _merge_part(merged: Metadata, part: str, metadata: Metadata) -> None:
    entries: dict[str, Any] = metadata.state_dict_metadata
    for name, entry in entries.items():
        known: Any = merged.state_dict_metadata.setdefault(name, dataclasses.replace(entry, chunks=[]))
        if known.size != entry.size or known.properties.dtype != entry.properties.dtype:
            raise CheckpointError(f"{part} holds {name} as {tuple(entry.size)}, other ranks as {tuple(known.size)}.")
        known.chunks.extend(entry.chunks)
    for index, place in metadata.storage_data.items():
        path = f"{part}/{place.relative_path}"
        merged.storage_data[index] = dataclasses.replace(place, relative_path=path)


def _read_into(reader: _VerifiedReader, metadata: Metadata, tensors: Mapping[str, torch.Tensor]) -> None:
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with torch.no_grad():
        planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
        reader.set_up_storage_reader(metadata, True)
        local_plan = reader.prepare_local_plan(planner.create_local_plan())
        [plan] = reader.prepare_global_plan(planner.create_global_plan([local_plan]))
        reader.read_data(planner.finish_plan(plan), planner).wait()


def _check_fits(
    path: Path, metadata: Metadata, tensors: Mapping[str, torch.Tensor], *, whole_sections: bool = True
) -> None:
    saved: dict[str, Any] = metadata.state_dict_metadata
    missing = sorted(tensors.keys() - saved.keys())
    if missing:
        raise CheckpointError(f"{path} lacks {_few(missing)}, which the model of this run has. Is it another run's?")
    sections = {name.split(".")[0] for name in tensors}
    extra = sorted(name for name in saved.keys() - tensors.keys() if name.split(".")[0] in sections)
    if whole_sections and extra:
        raise CheckpointError(f"{path} holds {_few(extra)}, which the model of this run lacks. Is it another run's?")
    for name, tensor in tensors.items():
        entry = saved[name]
        found, wanted = (tuple(entry.size), entry.properties.dtype), (tuple(tensor.shape), tensor.dtype)
        if found != wanted:
            raise CheckpointError(f"{path} holds {name} as {found}; this run needs {wanted}. Check the model section.")
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise CheckpointError(f"{path} holds only parts of {name}; it cannot be used.")


def _optimizer_entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Return optimizer tensors by parameter name, creating them if no step was taken yet."""
    fresh = not optimizer.state
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    if fresh:
        # torch creates state by a step with zero gradients, and only where there are none.
        for parameter in parameters:
            parameter.grad = None
    entries: Any = get_optimizer_state_dict(model, optimizer)["state"]
    if fresh:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
            if parameter in optimizer.state:
                # That step must not count, or the first real one would be the second.
                optimizer.state[parameter]["step"].zero_()
    return entries


def _split(state: State) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors and the plain values of a nested state by dotted name."""
    leaves = {name: leaf for name, _, _, leaf in _walk(state)}
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)}
    return tensors, {name: leaf for name, leaf in leaves.items() if name not in tensors}


def _walk(state: State, prefix: str = "") -> Iterator[tuple[str, State, str, Any]]:
    """Yield name, container, key and value of every leaf."""
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _walk(value, f"{name}.")
        elif value is None or isinstance(value, torch.Tensor | bool | int | float | str):
            yield name, state, key, value
        else:
            raise TypeError(f"{name} is of type {type(value).__name__}; a state holds tensors and plain numbers only")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
