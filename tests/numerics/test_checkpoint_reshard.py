"""A checkpoint saved on some ranks gives the same whole tensors on any other number of ranks, optimizer included."""

import zlib
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.mesh import AXES, World
from dsmoe_ray.training.checkpoint import CheckpointWriter, collect_state, load_checkpoint, read_model_tensors
from dsmoe_ray.training.checkpoint_commit import commit_checkpoint
from dsmoe_ray.training.checkpoint_store import read_manifest
from tests.numerics.ranks import run_in_world

SAVE_STEP = 7


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(8, 3, 5))
        self.w2 = nn.Parameter(torch.zeros(8, 3, 5))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        # Seven rows do not divide by two or four: FSDP's parts are uneven, some empty.
        self.trunk = nn.Linear(5, 7)
        self.norm = nn.Parameter(torch.zeros(5))


def fill(tensor: torch.Tensor, salt: str) -> torch.Tensor:
    """Return a tensor of the whole parameter's shape whose values depend on the name only."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(salt.encode())))


def like(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    if isinstance(parameter, DTensor):
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements)
    return whole


def build(mesh: DeviceMesh | None, layout: str) -> tuple[Model, torch.optim.AdamW]:
    model = Model()
    if mesh is not None:
        for name, parameter in list(model.experts.named_parameters()):
            placements = [Replicate(), Replicate(), Shard(0)]
            sharded = distribute_tensor(parameter.detach(), mesh, placements)
            setattr(model.experts, name, nn.Parameter(sharded))
        if layout == "fsdp":
            fully_shard(model.trunk, mesh=mesh["dp_shard", "ep"]._flatten())
        if layout == "submesh":
            for name, parameter in list(model.experts.named_parameters()):
                part = DTensor.from_local(parameter.detach().to_local(), mesh["ep"], [Shard(0)])
                setattr(model.experts, name, nn.Parameter(part))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: Model, optimizer: torch.optim.AdamW) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(like(parameter, fill(parameter, name)))
    for step in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = like(parameter, fill(parameter, f"{name} gradient {step}"))
        optimizer.step()
        optimizer.zero_grad()


def reference() -> dict[str, torch.Tensor]:
    model, optimizer = build(None, "")
    train(model, optimizer)
    return flat(collect_state(model, optimizer))


def flat(state: dict) -> dict[str, torch.Tensor]:
    return {f"{section}.{name}": tensor for section, part in state.items() for name, tensor in part.items()}


def check_loaded(path: Path, mesh: DeviceMesh | None, layout: str) -> None:
    model, optimizer = build(mesh, layout)
    state = {**collect_state(model, optimizer), "position": 0}
    load_checkpoint(path, state)
    assert state.pop("position") == 123
    # Fetched anew: loading must have reached the model and the optimizer themselves.
    found = flat(collect_state(model, optimizer))
    expected = reference()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        torch.testing.assert_close(whole, expected[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def save(directory: Path, mesh: DeviceMesh | None, layout: str) -> None:
    model, optimizer = build(mesh, layout)
    train(model, optimizer)
    writer = CheckpointWriter(directory, mesh=mesh)
    handle = writer.start_save({**collect_state(model, optimizer), "position": 123}, step=SAVE_STEP)
    # What happens to the live state from here on must not reach the files.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    part = handle.result(30)
    writer.close()
    if mesh is None:
        parts, degrees = [part], {}
    else:
        parts = [None] * mesh.size()
        distributed.all_gather_object(parts, part)
        degrees = dict(zip(AXES, mesh.shape, strict=True))
    if part.rank == 0:
        commit_checkpoint(directory, step=SAVE_STEP, parts=parts, config_digest="", mesh=degrees, keep=1)


def work(world: World, jobs: list[tuple[str, Path, str]]) -> None:
    for job, path, layout in jobs:
        if job == "save":
            save(path, world.mesh, layout)
        else:
            check_loaded(path / f"step-{SAVE_STEP:08d}", world.mesh, layout)
        distributed.barrier()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the same state, by the world and the layout that saved them."""
    root = tmp_path_factory.mktemp("checkpoints")
    paths = {name: root / name for name in ("one", "two", "two_fsdp", "four_submesh", "four_fsdp")}
    save(paths["one"], None, "")
    run_in_world(work, ParallelConfig(ep=2), [("save", paths["two"], ""), ("save", paths["two_fsdp"], "fsdp")])
    four = [("save", paths["four_fsdp"], "fsdp"), ("save", paths["four_submesh"], "submesh")]
    run_in_world(work, ParallelConfig(dp_replicate=2, ep=2), four)
    return {name: path / f"step-{SAVE_STEP:08d}" for name, path in paths.items()}


@pytest.mark.parametrize("saver", ["one", "two", "two_fsdp", "four_submesh", "four_fsdp"])
def test_one_rank_loads_what_any_world_saved(saved, saver):
    check_loaded(saved[saver], None, "")


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (ParallelConfig(ep=2), ""),
        (ParallelConfig(ep=4), ""),
        (ParallelConfig(dp_replicate=2, ep=2), "fsdp"),
        (ParallelConfig(dp_shard=2, ep=2), "fsdp"),
    ],
    ids=["ep2", "ep4", "dp_replicate2-ep2-fsdp", "dp_shard2-ep2-fsdp"],
)
def test_any_world_loads_what_any_other_saved(saved, config, layout):
    run_in_world(work, config, [("load", path.parent, layout) for path in saved.values()])


@pytest.mark.parametrize("saver", ["two_fsdp", "four_submesh"])
def test_one_process_reads_the_model_whole_and_layer_by_layer(saved, saver):
    found = dict(read_model_tensors(saved[saver]))
    expected = {name.removeprefix("model."): tensor for name, tensor in reference().items() if "model." in name}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_equal_copies_are_written_once_and_shared_out_evenly(saved):
    one, four = (read_manifest(saved[name]) for name in ("one", "four_submesh"))
    sizes = [
        sum(file.size_bytes for name, file in four.files.items() if name.startswith(f"rank-{rank:05d}"))
        for rank in range(4)
    ]
    total = sum(file.size_bytes for file in one.files.values())
    # Every tensor costs about a kilobyte of framing here, so sums are compared loosely: two copies would be double.
    assert sum(sizes) < 1.6 * total
    assert max(sizes) < 2 * min(sizes)
