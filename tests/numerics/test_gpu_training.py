"""Training on one GPU is training on the CPU: alone, over NCCL, and with two ranks that share the GPU.

Run it with ``bash tests/gpu.sh``. Float32 products are not shortened to TF32 (torch's default), so that both devices
differ in the order of sums and in the last bit of exp and erf only: a few times what two meshes of ranks differ by
(test_training_parity.py).
"""

import pytest
import torch
from torch.distributed.tensor import DTensor

from dsmoe_ray.config_io import parse_config
from dsmoe_ray.parallel import collectives
from dsmoe_ray.parallel.collectives import join_world, leave_world
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.exchange import CollectiveExchange
from dsmoe_ray.parallel.failures import FailureBoard
from dsmoe_ray.parallel.mesh import World
from dsmoe_ray.parallel.rendezvous import initialize_groups, open_store
from dsmoe_ray.training.checkpoint import CheckpointWriter
from dsmoe_ray.training.checkpoint_commit import commit_checkpoint
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.train_step import Trainer
from tests.numerics.ranks import free_port, run_on_ranks
from tests.numerics.test_training_parity import check_alike, make_config, make_shards

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SAME_DEVICE = 2e-5
"""Of a tensor's largest entry: sums of a thousand float32 terms in another order."""
OTHER_DEVICE = 5e-5
"""Likewise, and other implementations of exp and erf besides."""
START_S = 180.0
"""A process's first use of a GPU takes seconds, and loads kernels one by one."""


def alone(device):
    return join_world(ParallelConfig(), rank=0, address="", port=0, device=device)


def train(world, config, exchange=None):
    """Return the metrics of all steps, and this rank's gradients and parameters of the first, on the CPU."""
    trainer = Trainer(config, world=world, data=make_shards())
    if exchange is not None:
        trainer._exchange = exchange
    gradients = {}

    def record(*_):
        gradients.update({name: held_here(p.grad) for name, p in trainer.model.named_parameters()})

    handle = trainer.optimizer.register_step_pre_hook(record)
    first = trainer.run_step()
    handle.remove()
    parameters = {name: held_here(p) for name, p in trainer.model.named_parameters()}
    return [first] + [trainer.run_step() for _ in range(config.train.steps - 1)], gradients, parameters


def held_here(tensor):
    # Not full_tensor(): what is tested is not whether gloo gathers tensors on a GPU.
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().to("cpu", copy=True)


def check_same_run(found, expected, *, tolerance, loss_tolerance):
    steps, gradients, parameters = found
    check_alike(gradients, expected[1], tolerance=tolerance)
    check_alike(parameters, expected[2], tolerance=tolerance)
    for ours, theirs in zip(steps, expected[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=loss_tolerance)
        assert ours.loss_total == pytest.approx(theirs.loss_total, rel=loss_tolerance)
        assert ours.mi_ffn == pytest.approx(theirs.mi_ffn, abs=loss_tolerance)
    assert steps[0].grad_norm == pytest.approx(expected[0][0].grad_norm, rel=loss_tolerance)
    assert steps[-1].loss < 0.9 * steps[0].loss, "a run that learns nothing compares nothing"


@pytest.fixture(scope="module")
def on_gpu():
    return train(alone(GPU), make_config())


def test_a_gpu_trains_like_a_cpu_in_float32(on_gpu):
    check_same_run(on_gpu, train(alone(CPU), make_config()), tolerance=OTHER_DEVICE, loss_tolerance=5e-4)


def test_swiglu_experts_train_on_a_gpu_like_on_a_cpu():
    values = make_config(steps=10).model_dump(mode="json")
    values["model"]["ffn"]["activation"] = "swiglu"
    config = parse_config(values, TrainingRunConfig, source="test")
    check_same_run(train(alone(GPU), config), train(alone(CPU), config), tolerance=OTHER_DEVICE, loss_tolerance=5e-4)


def test_documents_kept_apart_train_on_a_gpu_like_on_a_cpu():
    values = make_config(steps=10).model_dump(mode="json")
    values["data"]["document_boundaries"] = True
    config = parse_config(values, TrainingRunConfig, source="test")
    check_same_run(train(alone(GPU), config), train(alone(CPU), config), tolerance=OTHER_DEVICE, loss_tolerance=5e-4)


@pytest.mark.parametrize(
    "routing",
    [{"mode": "top_k", "top_k": 2}, {"mode": "random_k", "top_k": 1}],
    ids=["top_k", "random_k"],
)
def test_sparse_training_on_a_gpu_is_that_on_a_cpu(routing):
    config = make_config(steps=5, routing_ffn=routing, loss={"load_balance": 0.01, "router_z": 1e-3})
    found, expected = train(alone(GPU), config), train(alone(CPU), config)
    check_alike(found[1], expected[1], tolerance=OTHER_DEVICE)
    # Later a near-tie between two experts may fall the other way.
    for ours, theirs in zip(found[0][:3], expected[0][:3], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=5e-4)
        assert ours.load_balance == pytest.approx(theirs.load_balance, rel=1e-3)


def test_bfloat16_steps_on_a_gpu_learn_and_stay_near_float32(on_gpu):
    steps, gradients, _ = train(alone(GPU), make_config(dtype="bfloat16"))
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    assert not any(step.skipped for step in steps)
    # bfloat16 keeps 8 bits (4e-3); averaged over a thousand tokens the first loss is much nearer than one of them.
    assert steps[0].loss == pytest.approx(on_gpu[0][0].loss, rel=4e-3)
    # Rounding feeds back over the steps, as any perturbation does.
    for ours, theirs in zip(steps, on_gpu[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=3e-2)
    assert steps[-1].loss < 0.9 * steps[0].loss


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputed_activations_on_a_gpu_change_nothing(checkpointing, on_gpu):
    found = train(alone(GPU), make_config(activation_checkpointing=checkpointing))
    check_same_run(found, on_gpu, tolerance=SAME_DEVICE, loss_tolerance=1e-4)


def test_compiled_attention_on_a_gpu_changes_nothing(on_gpu):
    found = train(alone(GPU), make_config(compile=True))
    # Fused kernels have their own exp, as another device would.
    check_same_run(found, on_gpu, tolerance=OTHER_DEVICE, loss_tolerance=5e-4)


def _train_over_nccl(rank, port, config):
    """Train with the exchange of NCCL, which a world of one rank does without otherwise."""
    store = open_store(config.parallel, rank=rank, address="127.0.0.1", port=port)
    torch.cuda.set_device(GPU)
    mesh = initialize_groups(store, config.parallel, rank=rank, address="127.0.0.1", device=GPU, backend="nccl")
    world = World(rank=rank, config=config.parallel, device=GPU, mesh=mesh, backend="nccl")
    collectives._membership = collectives._Membership(world, FailureBoard(store, rank=rank, world_size=1))
    result = train(world, config, exchange=CollectiveExchange(world))
    leave_world()
    return result


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_packed_and_sent_by_nccl_train_the_same(num_chunks, dtype):
    config = make_config({"exchange_chunks": num_chunks}, dtype=dtype)
    [found] = run_on_ranks(_train_over_nccl, 1, free_port(), config, timeout_s=START_S)
    if dtype == "float32":
        check_same_run(found, train(alone(GPU), config), tolerance=SAME_DEVICE, loss_tolerance=1e-4)
    else:
        # Chunks add up weight gradients in bfloat16, 8 bits.
        check_alike(found[1], train(alone(GPU), config)[1], tolerance=3e-2)


def _train_beside_a_peer(rank, port, config):
    world = join_world(config.parallel, rank=rank, address="127.0.0.1", port=port, device=GPU, backend="gloo")
    try:
        return train(world, config)
    finally:
        leave_world()


def _whole(parts, like):
    """Put the ranks' tensors together: experts are cut along their first dimension, all else is on every rank."""
    return {
        name: parts[0][name] if parts[0][name].shape == tensor.shape else torch.cat([part[name] for part in parts])
        for name, tensor in like.items()
    }


@pytest.mark.parametrize(
    "degrees",
    [{"ep": 2}, {"ep": 2, "exchange_chunks": 3}, {"dp_replicate": 2}],
    ids=["ep=2", "ep=2 in 3 chunks", "dp_replicate=2"],
)
def test_two_ranks_that_share_a_gpu_train_like_one(degrees, on_gpu):
    config = make_config(degrees)
    results = run_on_ranks(_train_beside_a_peer, 2, free_port(), config, timeout_s=START_S)
    steps, gradients, parameters = zip(*results, strict=True)
    found = (steps[0], _whole(gradients, on_gpu[1]), _whole(parameters, on_gpu[2]))
    check_same_run(found, on_gpu, tolerance=SAME_DEVICE, loss_tolerance=1e-4)
    assert steps[1][-1].loss == steps[0][-1].loss, "ranks disagree about the loss"


@pytest.mark.parametrize("degrees", [{"ep": 2, "trunk": "shard"}, {"dp_shard": 2}], ids=["trunk", "dp_shard=2"])
def test_parameters_sharded_over_two_ranks_that_share_a_gpu_train_like_whole_ones(degrees, on_gpu):
    config = make_config(degrees)
    results = run_on_ranks(_train_beside_a_peer, 2, free_port(), config, timeout_s=START_S)
    steps, gradients, parameters = zip(*results, strict=True)
    found = (steps[0], _whole(gradients, on_gpu[1]), _whole(parameters, on_gpu[2]))
    check_same_run(found, on_gpu, tolerance=SAME_DEVICE, loss_tolerance=1e-4)


def test_sparse_training_on_two_ranks_that_share_a_gpu_is_that_of_one():
    routing = {"steps": 5, "routing_ffn": {"mode": "top_k", "top_k": 2}}
    config = make_config({"ep": 2}, **routing)
    results = run_on_ranks(_train_beside_a_peer, 2, free_port(), config, timeout_s=START_S)
    expected = train(alone(GPU), make_config(**routing))
    check_alike(_whole([result[1] for result in results], expected[1]), expected[1], tolerance=SAME_DEVICE)


def test_two_ranks_that_share_a_gpu_train_like_one_in_bfloat16():
    config = make_config({"ep": 2}, dtype="bfloat16")
    results = run_on_ranks(_train_beside_a_peer, 2, free_port(), config, timeout_s=START_S)
    expected = train(alone(GPU), make_config(dtype="bfloat16"))
    # Partial outputs are rounded to 8 bits on their way.
    check_alike(_whole([result[1] for result in results], expected[1]), expected[1], tolerance=3e-2)
    for ours, theirs in zip(results[0][0], expected[0], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=3e-2)


def _train_with_a_break(rank, config, directory):
    """Return the losses of six steps at a stretch, and of the same with a save, a new trainer and a load in between."""
    whole = Trainer(config, world=alone(GPU), data=make_shards())
    expected = [whole.run_step().loss for _ in range(6)]
    before = Trainer(config, world=alone(GPU), data=make_shards())
    found = [before.run_step().loss for _ in range(3)]
    writer = CheckpointWriter(directory)
    save = writer.start_save(before.checkpoint_state(), step=3)
    # What is saved is the state at the call: steps done while the files are written do not change it.
    found += [before.run_step().loss for _ in range(2)]
    path = commit_checkpoint(directory, step=3, parts=[save.result(60)], config_digest="", mesh={}, keep=1)
    writer.close()
    after = Trainer(config, world=alone(GPU), data=make_shards())
    after.restore(path)
    resumed = [after.run_step().loss for _ in range(3)]
    return expected, found, resumed, after.model.embedding.weight.device.type


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_on_a_gpu_is_the_uninterrupted_one_to_the_bit(dtype, tmp_path):
    values = make_config(dtype=dtype).model_dump(mode="json")
    values["debug"]["deterministic"] = True
    config = parse_config(values, TrainingRunConfig, source="test")
    # In its own process, because deterministic kernels are a setting of the process.
    [(expected, found, resumed, device)] = run_on_ranks(_train_with_a_break, 1, config, tmp_path, timeout_s=START_S)
    assert device == "cuda"
    assert found == expected[:5]
    assert resumed == expected[3:]


def _peak_bytes(config):
    """Return the most memory that steps after the first take; the first makes the optimizer's state."""
    torch.cuda.empty_cache()
    trainer = Trainer(config, world=alone(GPU), data=make_shards())
    trainer.run_step()
    torch.cuda.reset_peak_memory_stats()
    trainer.run_step()
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_bfloat16_step_takes_little_more_memory_than_that_of_the_dense_twin(activation, record_property):
    values = make_config().model_dump(mode="json")
    values["train"] |= {"dtype": "bfloat16", "seq_len": 512, "num_tokens_per_step": 8192, "steps": 2, "loss": {}}
    values["model"] |= {"d_model": 512, "num_layers": 8, "max_seq_len": 512, "vocab_size": 4096}
    values["model"]["attention"] |= {"num_experts": 4, "num_kv_heads": 2, "head_dim": 64}
    values["model"]["ffn"] |= {"num_experts": 16, "d_ff": 128, "activation": activation}
    mixture = parse_config(values, TrainingRunConfig, source="test")
    twin = mixture.model_copy(update={"model": mixture.model.model_copy(update=_shape_of_twin(mixture))})
    found, expected = _peak_bytes(mixture), _peak_bytes(twin)
    record_property("peak_memory_ratio", found / expected)
    print(f"{activation}: {found / 2**20:.0f} MiB, dense twin {expected / 2**20:.0f} MiB, ratio {found / expected:.3f}")
    # The budget of a step. Routers and gates add to it; the dense experts keep fewer activations than the twin.
    assert found <= 1.1 * expected


def _shape_of_twin(config):
    twin = config.model.dense_twin()
    return {"attention": twin.attention, "ffn": twin.ffn}
