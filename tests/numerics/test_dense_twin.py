"""A mixture whose gates are all one is the dense transformer of equal shape, with the same weights in another layout.

This is what makes the dense twin the fair baseline: the same matrices, the same FLOPs, and gates on top. All is in
float64; the two differ in the order of a few thousand terms.
"""

import pytest
import torch

from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer

NUM_ATTENTION_EXPERTS, NUM_KV_HEADS, HEAD_DIM, NUM_FFN_EXPERTS, D_MODEL = 3, 2, 8, 4, 16
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def make_mixture(activation, kind):
    d_hidden = 8 if kind == "mlp" else None
    routers = [
        {"kind": kind, "d_hidden": d_hidden, "gate_scale": scale} for scale in (NUM_ATTENTION_EXPERTS, NUM_FFN_EXPERTS)
    ]
    config = ModelConfig.model_validate(
        {
            "vocab_size": 30,
            "d_model": D_MODEL,
            "num_layers": 2,
            "max_seq_len": 16,
            "attention": {
                "kind": "moa",
                "num_experts": NUM_ATTENTION_EXPERTS,
                "num_kv_heads": NUM_KV_HEADS,
                "head_dim": HEAD_DIM,
                "router": routers[0],
            },
            "ffn": {
                "kind": "moe",
                "num_experts": NUM_FFN_EXPERTS,
                "d_ff": 6,
                "activation": activation,
                "router": routers[1],
            },
            "init_std": 0.3,
        }
    )
    model = Transformer(config, compute_dtype=torch.float64)
    initialize(model, config, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("router.proj.weight"):
                # Scores of zero are probabilities of 1/N; times a gate scale of N they are one.
                parameter.zero_()
    return model.double()


def to_twin_layout(tensors):
    """Mixture tensors, weights or gradients, as the twin lays them out; routers have no counterpart."""
    twin = {}
    for name, tensor in tensors.items():
        if name.endswith(("attention.wq", "attention.wo")):
            # Heads lie expert by expert in the mixture; in the twin those that read one KV head lie together.
            by_head = tensor.unflatten(1, (NUM_KV_HEADS, HEAD_DIM))
            twin[name] = by_head.transpose(0, 1).reshape(-1, D_MODEL)
        elif ".experts." in name:
            twin[name.replace(".experts.", ".")] = tensor.flatten(0, 1)
        elif "router" not in name:
            twin[name] = tensor
    return twin


def run(model):
    generator = torch.Generator().manual_seed(3)
    tokens_BS, targets_BS = (torch.randint(30, (2, 12), generator=generator) for _ in range(2))
    output = model(tokens_BS, targets_BS=targets_BS)
    output.loss_sum.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return model(tokens_BS).logits_BSV.detach(), output.loss_sum.detach(), gradients


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_mixture_with_all_gates_one_is_its_dense_twin(activation, kind):
    mixture = make_mixture(activation, kind)
    twin = Transformer(mixture.config.dense_twin(), compute_dtype=torch.float64).double()
    twin.load_state_dict(to_twin_layout(mixture.state_dict()))
    logits, loss, gradients = run(mixture)
    twin_logits, twin_loss, twin_gradients = run(twin)
    torch.testing.assert_close(logits, twin_logits, **EXACT)
    torch.testing.assert_close(loss, twin_loss, **EXACT)
    gradients = to_twin_layout(gradients)
    assert gradients.keys() == twin_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-6, name
        torch.testing.assert_close(
            gradient, twin_gradients[name], **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_twin_has_the_mixtures_parameters_less_its_routers():
    mixture = make_mixture("swiglu", "mlp")
    twin = Transformer(mixture.config.dense_twin())
    routers = sum(parameter.numel() for name, parameter in mixture.named_parameters() if "router" in name)
    count = sum(parameter.numel() for parameter in mixture.parameters())
    assert sum(parameter.numel() for parameter in twin.parameters()) == count - routers
