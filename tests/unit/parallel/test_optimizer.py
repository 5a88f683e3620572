"""Parameter groups and clipping in a world of one rank."""

import pytest
import torch

from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from dsmoe_ray.parallel.collectives import join_world
from dsmoe_ray.parallel.config import ParallelConfig
from dsmoe_ray.parallel.optimizer import build_optimizer, clip_grad_norm, reduce_gradients

MODEL = ModelConfig.model_validate(
    {
        "vocab_size": 16,
        "d_model": 8,
        "num_layers": 2,
        "max_seq_len": 8,
        "attention": {"kind": "gqa", "num_heads": 2, "num_kv_heads": 1, "head_dim": 4},
        "ffn": {"kind": "moe", "num_experts": 4, "d_ff": 4},
    }
)


@pytest.fixture
def world():
    return join_world(ParallelConfig(), rank=0, address="", port=0, device=torch.device("cpu"))


@pytest.fixture
def model():
    model = Transformer(MODEL)
    initialize(model, MODEL, seed=0)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
    return model


def _gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_norm_scales_do_not_decay_and_everything_else_does(model):
    optimizer = build_optimizer(model, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    decays = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: decays[id(parameter)] for name, parameter in model.named_parameters()}
    assert found == {name: 0.0 if "norm" in name else 0.1 for name, _ in model.named_parameters()}


@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clipped", "below the limit"])
def test_clipping_in_one_process_is_that_of_torch(model, world, max_norm):
    norm = clip_grad_norm(model, world, max_norm)
    found = _gradients(model)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad.fill_(0.1 * (index + 1))
    expected_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    # The two sum squares in another order and precision.
    torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, _gradients(model), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_shows_in_the_norm(model, world, bad):
    next(iter(model.parameters())).grad.view(-1)[0] = bad
    assert not torch.isfinite(clip_grad_norm(model, world, 1.0))


def test_alone_there_is_nothing_to_sum(model, world):
    before = _gradients(model)
    reduce_gradients(model, world)
    torch.testing.assert_close(_gradients(model), before, rtol=0, atol=0)
