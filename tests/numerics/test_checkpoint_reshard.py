"""A checkpoint saved on some ranks gives the same whole tensors on any other ranks, optimizer included, bit for bit."""

import zlib
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from dsmoe_ray.model.config import MoaConfig, ModelConfig, MoeConfig
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.fsdp import shard_model
from dsmoe_ray.parallel.mesh import AXES, World
from dsmoe_ray.parallel.optimizer import build_optimizer
from dsmoe_ray.training.checkpoint import CheckpointWriter, collect_state, load_checkpoint, read_model_tensors
from dsmoe_ray.training.checkpoint_commit import commit_checkpoint
from dsmoe_ray.training.checkpoint_store import checkpoint_path, read_manifest
from tests.numerics.ranks import run_in_world

# Starting the worlds takes the time: five that save, four that load.
pytestmark = pytest.mark.slow

# Odd sizes: a sharded trunk gets parts of unequal length, some of them empty.
CONFIG = ModelConfig(
    vocab_size=13,
    d_model=6,
    num_layers=2,
    max_seq_len=4,
    attention=MoaConfig(kind="moa", num_experts=3, num_kv_heads=1, head_dim=2),
    ffn=MoeConfig(kind="moe", num_experts=8, d_ff=3, activation="swiglu"),
)
SAVE_STEP = 7
SAVERS = {
    "one": ParallelConfig(),
    "ep2": ParallelConfig(ep=2),
    "replicate2-ep2": ParallelConfig(dp_replicate=2, ep=2),
    "replicate2-ep2-trunk": ParallelConfig(dp_replicate=2, ep=2, trunk="shard"),
    "shard2-ep2-trunk": ParallelConfig(dp_shard=2, ep=2, trunk="shard"),
}
LOADERS = {
    "ep2": SAVERS["ep2"],
    "ep4": ParallelConfig(ep=4),
    "replicate2-shard2": ParallelConfig(dp_replicate=2, dp_shard=2),
    "shard2-ep2-trunk": SAVERS["shard2-ep2-trunk"],
}


def draw(name: str, shape: torch.Size) -> torch.Tensor:
    """Return a whole tensor whose values depend on its name only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def part_of(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return what a rank holds of a whole tensor, in the form of ``like``."""
    if not isinstance(like, DTensor):
        return whole
    [place] = like.__create_chunk_list__()
    part = whole
    for dim, (offset, size) in enumerate(zip(place.offsets, place.sizes, strict=True)):
        part = part.narrow(dim, offset if size else 0, size)
    result = torch.zeros_like(like)
    result.to_local().copy_(part)
    return result


def build(world: World) -> tuple[Transformer, torch.optim.AdamW]:
    model = Transformer(CONFIG)
    shard_model(model, world, lambda _, shape: torch.zeros(shape))
    return model, build_optimizer(model, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def flat(state: dict) -> dict[str, torch.Tensor]:
    return {f"{section}.{name}": tensor for section, part in state.items() for name, tensor in part.items()}


ALONE = World(rank=0, config=ParallelConfig(), device=torch.device("cpu"), mesh=None, backend="gloo")


def save(world: World, directory: Path) -> None:
    state = collect_state(*build(world))
    for name, tensor in flat(state).items():
        # Drawn and not trained: fused AdamW rounds the last bit by where a vector ends, which depends on the mesh.
        tensor.copy_(part_of(draw(name, tensor.shape), tensor))
    writer = CheckpointWriter(directory, mesh=world.mesh)
    handle = writer.start_save({**state, "position": 123}, step=SAVE_STEP)
    # What happens to the live state from here on must not reach the files.
    for tensor in flat(state).values():
        tensor.zero_()
    parts = [handle.result(30)]
    writer.close()
    if world.world_size > 1:
        parts = [None] * world.world_size
        distributed.all_gather_object(parts, handle.result())
    if world.rank == 0:
        degrees = {axis: getattr(world.config, axis) for axis in AXES}
        commit_checkpoint(directory, step=SAVE_STEP, parts=parts, config_digest="", mesh=degrees, keep=1)


def check_loaded(world: World, paths: list[Path]) -> None:
    for path in paths:
        model, optimizer = build(world)
        state = {**collect_state(model, optimizer), "position": 0}
        load_checkpoint(path, state)
        assert state.pop("position") == 123
        # Fetched anew: loading must have reached the model and the optimizer themselves.
        found = flat(collect_state(model, optimizer))
        for name, tensor in found.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(whole, draw(name, whole.shape)), f"{name} from {path}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints of the same state, by the world that saved them."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name, config in SAVERS.items():
        if config.world_size == 1:
            save(ALONE, root / name)
        else:
            run_in_world(save, config, root / name)
    return {name: checkpoint_path(root / name, SAVE_STEP) for name in SAVERS}


def test_one_rank_loads_what_any_world_saved(saved):
    check_loaded(ALONE, list(saved.values()))


@pytest.mark.parametrize("loader", LOADERS)
def test_any_world_loads_what_any_other_saved(saved, loader):
    run_in_world(check_loaded, LOADERS[loader], list(saved.values()))


@pytest.mark.parametrize("saver", ["replicate2-ep2-trunk", "shard2-ep2-trunk"])
def test_one_process_reads_the_model_whole_and_layer_by_layer(saved, saver):
    found = dict(read_model_tensors(saved[saver]))
    assert found.keys() == Transformer(CONFIG).state_dict().keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, draw(f"model.{name}", tensor.shape)), name


def test_equal_copies_are_written_once_and_shared_out_evenly(saved):
    one, four = (read_manifest(saved[name]) for name in ("one", "replicate2-ep2"))
    sizes = [
        sum(file.size_bytes for name, file in four.files.items() if name.startswith(f"rank-{rank:05d}"))
        for rank in range(4)
    ]
    total = sum(file.size_bytes for file in one.files.values())
    # Every tensor costs about a kilobyte of framing here, so sums are compared loosely: two copies would be double.
    assert sum(sizes) < 1.6 * total
    assert max(sizes) < 2 * min(sizes)
