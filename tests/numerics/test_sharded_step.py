"""One optimizer step on any mesh is the step of a single process: loss, every gradient, global norm, new weights."""

from functools import partial

import pytest
import torch
from torch.distributed.tensor import DTensor

from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import draw_initial
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.parallel import optimizer as optimizer_module
from dsmoe_ray.parallel.collectives import all_reduce_sum_, join_world
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.exchange import build_exchange
from dsmoe_ray.parallel.fsdp import shard_model
from dsmoe_ray.parallel.optimizer import build_optimizer, clip_grad_norm, reduce_gradients
from tests.numerics.ranks import run_in_world

# Some ten seconds and more as a whole.
pytestmark = pytest.mark.slow

NUM_SEQUENCES, SEQ_LEN = 8, 16
MICRO_STEPS = 2
MAX_NORM = 0.05
"""Far below the gradient's norm, so that clipping acts."""
ROUNDING = 1e-5
"""Largest deviation over a tensor's largest value: sums of up to a few thousand float32 terms (6e-8 each) in another
order, through four layers of forward and backward."""

MODEL = ModelConfig.model_validate(
    {
        "vocab_size": 64,
        "d_model": 32,
        "num_layers": 2,
        "max_seq_len": SEQ_LEN,
        "attention": {"kind": "moa", "num_experts": 2, "num_kv_heads": 2, "head_dim": 8, "router": {"gate_scale": 2.0}},
        "ffn": {
            "kind": "moe",
            "num_experts": 8,
            "d_ff": 12,
            "activation": "swiglu",
            "router": {"kind": "mlp", "d_hidden": 16, "gate_scale": 8.0},
        },
        "init_std": 0.2,
    }
)


def _step(world, *, dtype=torch.float32, checkpointing="none"):
    """Run one clipped step on this rank's share of the batch; return what the whole world ended up with."""
    model = Transformer(MODEL, compute_dtype=dtype, activation_checkpointing=checkpointing)
    shard_model(model, world, partial(_initial, seed=0))
    # AdamW divides by |gradient| + eps: with a tiny eps it would blow rounding noise up to the size of the step.
    optimizer = build_optimizer(model, lr=1e-2, betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1)
    exchange = build_exchange(world)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, MODEL.vocab_size, (NUM_SEQUENCES, SEQ_LEN + 1), generator=generator)
    mine = tokens.chunk(world.world_size)[world.rank]
    loss = torch.zeros(())
    for micro_batch in mine.chunk(MICRO_STEPS):
        output = model(micro_batch[:, :-1], targets_BS=micro_batch[:, 1:], exchange=exchange)
        share = output.loss_sum / (NUM_SEQUENCES * SEQ_LEN)
        share.backward()
        loss += share.detach()
    reduce_gradients(model, world)
    gradients = {name: _whole(parameter.grad).clone() for name, parameter in model.named_parameters()}
    norm = clip_grad_norm(model, world, MAX_NORM)
    optimizer.step()
    weights = {name: _whole(parameter.detach()) for name, parameter in model.named_parameters()}
    return all_reduce_sum_(loss), gradients, norm, weights


def _initial(name, shape, *, seed):
    return draw_initial(name, shape, MODEL, seed=seed)


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _alone():
    return join_world(ParallelConfig(), rank=0, address="", port=0, device=torch.device("cpu"))


def _assert_equal(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        deviation = (found[name] - value).abs().max() / value.abs().max()
        assert deviation <= tolerance, f"{name} deviates by {deviation:.1e} of its largest value"


def _assert_same_step(results, alone, tolerance):
    loss, gradients, norm, weights = alone
    assert all(torch.equal(result[2], results[0][2]) for result in results), "ranks disagree on the norm"
    for found_loss, found_gradients, found_norm, found_weights in results:
        torch.testing.assert_close(found_loss, loss, rtol=tolerance, atol=0)
        torch.testing.assert_close(found_norm, norm, rtol=tolerance, atol=0)
        _assert_equal(found_gradients, gradients, tolerance)
        _assert_equal(found_weights, weights, tolerance)


@pytest.mark.parametrize(
    "degrees",
    [
        {"ep": 2},
        {"ep": 2, "exchange_chunks": 2},
        {"dp_replicate": 2},
        {"dp_shard": 2},
        {"ep": 2, "dp_replicate": 2},
        {"ep": 2, "dp_shard": 2},
        {"dp_replicate": 2, "dp_shard": 2},
        {"trunk": "shard", "ep": 2},
        {"trunk": "shard", "dp_shard": 2},
        {"trunk": "shard", "ep": 2, "dp_replicate": 2},
        {"trunk": "shard", "ep": 2, "dp_shard": 2},
    ],
    ids=lambda degrees: " ".join(f"{axis}={degree}" for axis, degree in degrees.items()),
)
def test_a_clipped_step_is_that_of_one_process(degrees):
    results = run_in_world(_step, ParallelConfig(**degrees))
    _assert_same_step(results, _step(_alone()), ROUNDING)


def _step_in_small_buckets(world):
    # About one matrix each, so that some gradients are packed, some go alone and in place.
    optimizer_module._BUCKET_BYTES = 3000
    return _step(world)


def test_gradients_summed_in_many_buckets_give_the_same_step():
    results = run_in_world(_step_in_small_buckets, ParallelConfig(ep=2))
    _assert_same_step(results, _step(_alone()), ROUNDING)


def _evaluate_between_steps(world):
    """Return which parameters are not sharded after an evaluation, and how far it is from the loss while training."""
    model = Transformer(MODEL)
    shard_model(model, world, partial(_initial, seed=0))
    tokens = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN)
    losses = []
    for training in (True, False):
        with torch.set_grad_enabled(training):
            output = model(tokens, targets_BS=tokens, exchange=build_exchange(world))
        if training:
            output.loss_sum.backward()
        losses.append(output.loss_sum.item())
    not_sharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    return not_sharded, losses


def test_weights_are_sharded_again_after_an_evaluation():
    config = ParallelConfig(trunk="shard", ep=2)
    for not_sharded, (while_training, evaluated) in run_in_world(_evaluate_between_steps, config):
        assert not_sharded == []
        assert evaluated == while_training


def _recomputing_step(world):
    return _step(world, checkpointing="full")


@pytest.mark.parametrize("trunk", ["replicate", "shard"])
def test_recomputing_blocks_changes_nothing(trunk):
    results = run_in_world(_recomputing_step, ParallelConfig(ep=2, trunk=trunk))
    _assert_same_step(results, _step(_alone()), ROUNDING)


def _bfloat16_step(world):
    return _step(world, dtype=torch.bfloat16)


@pytest.mark.parametrize("degrees", [{"ep": 2}, {"dp_shard": 2}], ids=["ep=2", "dp_shard=2"])
def test_a_bfloat16_step_is_that_of_one_process_up_to_bfloat16_rounding(degrees):
    results = run_in_world(_bfloat16_step, ParallelConfig(**degrees))
    # bfloat16 keeps 8 bits (4e-3), and partial sums are rounded to it at other places.
    _assert_same_step(results, _bfloat16_step(_alone()), 3e-2)


def _break_gradient(world):
    """Make one gradient of the last rank infinite."""
    model = Transformer(MODEL)
    shard_model(model, world, partial(_initial, seed=0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if world.rank == world.world_size - 1:
        _whole_or_local(model.blocks[0].ffn.experts.w1.grad).view(-1)[3] = float("inf")
    return clip_grad_norm(model, world, 1.0).item()


def _whole_or_local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_a_non_finite_gradient_on_one_rank_shows_in_the_norm_of_all():
    assert run_in_world(_break_gradient, ParallelConfig(ep=2)) == [float("inf")] * 2


def _unit_norm(world):
    model = Transformer(MODEL)
    shard_model(model, world, partial(_initial, seed=0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return clip_grad_norm(model, world, 1e9).item() ** 2


@pytest.mark.parametrize(
    "degrees",
    [{"ep": 2, "dp_replicate": 2}, {"ep": 2, "dp_shard": 2}, {"trunk": "shard", "ep": 2, "dp_replicate": 2}],
    ids=str,
)
def test_the_norm_counts_every_element_once(degrees):
    num_elements = sum(parameter.numel() for parameter in Transformer(MODEL).parameters())
    for square in run_in_world(_unit_norm, ParallelConfig(**degrees)):
        assert square == pytest.approx(num_elements, rel=1e-6)
