"""``train.compile`` changes speed, not results: fused float32 operations round alike or in the last bits."""

import shutil

import pytest
import torch

from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer
from tests.fakes.tiny_run import make_trainer

CONFIG = ModelConfig.model_validate(
    {
        "vocab_size": 40,
        "d_model": 16,
        "num_layers": 2,
        "max_seq_len": 24,
        "attention": {"kind": "moa", "num_experts": 3, "num_kv_heads": 2, "head_dim": 8},
        "ffn": {"kind": "moe", "num_experts": 4, "d_ff": 12, "activation": "swiglu"},
        "init_std": 0.2,
    }
)


def run(*, compiled, checkpointing):
    model = Transformer(CONFIG, activation_checkpointing=checkpointing)
    initialize(model, CONFIG, seed=0)
    if compiled:
        for block in model.blocks:
            block.compile_attention()
    generator = torch.Generator().manual_seed(0)
    tokens_BS, targets_BS = (torch.randint(40, (2, 12), generator=generator) for _ in range(2))
    loss = model(tokens_BS, targets_BS=targets_BS).loss_sum
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_compiled_attention_gives_the_same_loss_and_gradients(checkpointing):
    loss, gradients = run(compiled=False, checkpointing=checkpointing)
    found_loss, found = run(compiled=True, checkpointing=checkpointing)
    # A few float32 roundings, 6e-8 each; 7e-7 is seen.
    torch.testing.assert_close(found_loss, loss, rtol=1e-6, atol=0)
    for name, gradient in gradients.items():
        deviation = (found[name] - gradient).abs().max() / gradient.abs().max()
        assert deviation < 5e-6, name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_run_has_the_losses_of_a_plain_one(tiny_config):
    routing = "train.routing_attention={mode: random_k, top_k: 1}"
    plain, compiled = (
        make_trainer(tiny_config("model.init_std=0.2", "train.lr=0.01", routing, f"train.compile={switch}"))
        for switch in ("false", "true")
    )
    assert all(hasattr(block._run_attention, "_torchdynamo_orig_callable") for block in compiled.model.blocks)
    expected, found = ([trainer.run_step() for _ in range(4)] for trainer in (plain, compiled))
    assert found[0].loss == pytest.approx(expected[0].loss, rel=1e-6)
    # From the first update on, last bits feed back through AdamW, which magnifies them where gradients are tiny.
    assert [row.loss for row in found] == pytest.approx([row.loss for row in expected], rel=1e-4)
    assert [row.mi_attention for row in found] == pytest.approx([row.mi_attention for row in expected], rel=1e-3)
