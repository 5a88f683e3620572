"""One process and several ranks train alike: losses, gradients, global norm and parameters.

Only the order of float32 sums differs between meshes. A sum of n terms is off by about sqrt(n) * 6e-8 of its scale;
over the thousand tokens of a step that is 2e-6 of a gradient's largest entry. AdamW's first update is
``lr * sign(gradient)`` where a gradient is far above eps, so parameters are compared with eps at the size of typical
gradients, where the update is smooth. Losses over 20 steps let such differences feed back; they stay below 1e-4 of
the loss.
"""

import numpy as np
import pytest
from torch.distributed.tensor import DTensor

from dsmoe_ray.config_io import parse_config
from dsmoe_ray.data.token_shards import TokenShards
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.train_step import Trainer
from tests.fakes.tiny_run import ALONE
from tests.numerics.ranks import run_in_world

MESHES = {
    "ep=2": {"ep": 2},
    "dp=2": {"dp_replicate": 2},
    "dp=2, ep=2": {"dp_replicate": 2, "ep": 2},
    "dp_shard=2": {"dp_shard": 2},
    "dp_shard=2, ep=2, trunk sharded": {"dp_shard": 2, "ep": 2, "trunk": "shard"},
    "ep=2 in 3 chunks": {"ep": 2, "exchange_chunks": 3},
}
ROUTER = {"kind": "mlp", "d_hidden": 16, "gate_scale": 8.0, "inference": {"mode": "top_k", "top_k": 2}}


def make_config(parallel=None, **train):
    values = {
        "run": {"name": "parity", "dir": "unused"},
        "model": {
            "vocab_size": 64,
            "d_model": 32,
            "num_layers": 2,
            "max_seq_len": 32,
            "init_std": 0.1,
            "attention": {"kind": "moa", "num_experts": 4, "num_kv_heads": 2, "head_dim": 8},
            "ffn": {"kind": "moe", "num_experts": 8, "d_ff": 16, "router": ROUTER},
        },
        "data": {"paths": ["unused"]},
        "parallel": parallel or {},
        "train": {
            "steps": 20,
            "seq_len": 32,
            "num_tokens_per_step": 1024,
            "lr": 1e-2,
            "eps": 1e-3,
            "clip_norm": 0.5,
            "loss": {"mutual_information_attention": 0.01, "mutual_information_ffn": 0.05},
            **train,
        },
    }
    return parse_config(values, TrainingRunConfig, source="test")


def make_shards():
    """Return a text with structure: a token mostly follows from the one before it."""
    generator = np.random.default_rng(0)
    successor = generator.permutation(63) + 1
    tokens = [1]
    for surprise in generator.random(16_384) < 0.2:
        tokens.append(int(generator.integers(1, 64)) if surprise else int(successor[tokens[-1] - 1]))
    return TokenShards.from_documents([np.array(tokens)], vocab_size=64)


def whole(tensor):
    """Return all of a tensor, wherever its parts are, as plain data."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(world, config):
    """Return the losses of all steps, and norm, gradients and parameters of the first."""
    trainer = Trainer(config, world=world, data=make_shards())
    seen = {}

    def record(*_):
        seen["gradients"] = {name: whole(p.grad) for name, p in trainer.model.named_parameters()}

    handle = trainer.optimizer.register_step_pre_hook(record)
    first = trainer.run_step()
    handle.remove()
    parameters = {name: whole(p) for name, p in trainer.model.named_parameters()}
    steps = [first] + [trainer.run_step() for _ in range(config.train.steps - 1)]
    return steps, seen["gradients"], parameters


def check_alike(ours, reference, *, tolerance):
    """Compare tensors by name, relative to the largest entry of each."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert error < tolerance, f"{name}: {error:.1e} of its largest entry"


@pytest.fixture(scope="module")
def reference():
    return train(ALONE, make_config())


@pytest.mark.parametrize("parallel", MESHES.values(), ids=MESHES.keys())
def test_a_mesh_of_ranks_trains_like_one_process(parallel, reference):
    config = make_config(parallel)
    results = run_in_world(train, config.parallel, config)
    steps, gradients, parameters = results[0]
    reference_steps, reference_gradients, reference_parameters = reference
    check_alike(gradients, reference_gradients, tolerance=2e-5)
    check_alike(parameters, reference_parameters, tolerance=2e-5)
    assert steps[0].grad_norm > config.train.clip_norm, "the first step must be clipped for the norm to matter"
    for ours, expected in zip(steps, reference_steps, strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=1e-4)
        assert ours.loss_total == pytest.approx(expected.loss_total, rel=1e-4)
        assert ours.grad_norm == pytest.approx(expected.grad_norm, rel=2e-3)
        assert ours.mi_ffn == pytest.approx(expected.mi_ffn, abs=1e-4)
    assert steps[-1].loss < 0.9 * steps[0].loss, "a run that learns nothing compares nothing"
    assert all(other[0][-1].loss == steps[-1].loss for other in results), "ranks disagree about the loss"


def test_accumulated_micro_steps_train_like_one_large_batch_without_router_losses(reference):
    """Router losses take the running mean over micro-steps, so only the language-model loss is exactly additive."""
    plain = {"loss": {"mutual_information_attention": 0.0, "mutual_information_ffn": 0.0}}
    whole_batch = train(ALONE, make_config(**plain))
    accumulated = train(ALONE, make_config(num_tokens_per_micro_step=256, **plain))
    check_alike(accumulated[1], whole_batch[1], tolerance=2e-5)
    assert accumulated[0][-1].loss == pytest.approx(whole_batch[0][-1].loss, rel=1e-4)
    # What is reported of the routers is the whole batch's all the same.
    assert accumulated[0][0].mi_ffn == pytest.approx(whole_batch[0][0].mi_ffn, abs=1e-6)


@pytest.mark.parametrize(
    "routing",
    [{"mode": "top_k", "top_k": 2}, {"mode": "random_k", "top_k": 1}, {"mode": "anneal", "top_k": 2, "end_step": 4}],
    ids=["top_k", "random_k", "anneal"],
)
def test_sparse_training_on_two_ranks_is_that_of_one(routing):
    # Later a near-tie between two experts may fall the other way, and from there the runs part.
    recipe = {"steps": 5, "routing_ffn": routing, "loss": {"load_balance": 0.01, "router_z": 1e-3}}
    one = train(ALONE, make_config(**recipe))
    config = make_config({"ep": 2}, **recipe)
    two = run_in_world(train, config.parallel, config)[0]
    check_alike(two[1], one[1], tolerance=2e-5)
    for ours, expected in zip(two[0], one[0], strict=True):
        assert ours.loss == pytest.approx(expected.loss, rel=1e-4)
        assert ours.load_balance == pytest.approx(expected.load_balance, rel=1e-3)
