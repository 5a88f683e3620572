"""Every runner that a CPU has, by name, and models with all parts that a runner must know."""

import shutil

import pytest
import torch

from dsmoe_ray.inference.cpu_experts import CpuExperts
from dsmoe_ray.inference.cpu_library import COMPILERS, KernelsUnavailableError
from dsmoe_ray.inference.cpu_runner import CpuRunner
from dsmoe_ray.inference.row_math import ExactMath, FastMath
from dsmoe_ray.inference.sparse_experts import LocalExperts, experts_of
from dsmoe_ray.inference.torch_runner import TorchRunner
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import initialize
from dsmoe_ray.model.transformer import Transformer

EXACT_RUNNERS = ("torch exact", "cpu native", "cpu portable")
"""Rows do not depend on their batch, to the bit. A second word says how the kernels are built."""
FAST_RUNNERS = ("torch fast", "cpu fast")
RUNNERS = (*EXACT_RUNNERS, "torch fast")
"""All that compute in different ways: the fast compiled one differs in the mean of ``threshold_top_k`` only."""
MAX_TOKENS, MAX_SEQS = 160, 16


def make_runner(kind, model, *, num_blocks, block_size=16, num_threads=1):
    """Return a runner; the compiled ones have blocks of 16 positions only, the others the threads of PyTorch."""
    if kind.startswith("torch"):
        return TorchRunner(model, num_blocks=num_blocks, block_size=block_size, numerics=kind.split()[1])
    numerics = "fast" if kind == "cpu fast" else "exact"
    return with_kernels(
        kind,
        lambda: CpuRunner(
            model,
            num_blocks=num_blocks,
            max_tokens=MAX_TOKENS,
            max_seqs=MAX_SEQS,
            numerics=numerics,
            num_threads=num_threads,
        ),
    )


def make_experts(kind, model):
    """Return the expert backend of a runner."""
    if kind.startswith("torch"):
        return LocalExperts(experts_of(model), numerics=ExactMath() if kind == "torch exact" else FastMath())
    return with_kernels(kind, lambda: CpuExperts(experts_of(model), max_tokens=MAX_TOKENS, num_threads=1))


def with_kernels(kind, make):
    """Return what ``make`` makes with kernels of a kind; skip the test only where no compiler could build them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSMOE_CPU_KERNELS", "portable" if kind == "cpu portable" else "")
        try:
            return make()
        except KernelsUnavailableError as error:
            if any(map(shutil.which, COMPILERS)):
                pytest.fail(str(error))
            pytest.skip(str(error))


def make_model(
    *,
    attention="moa",
    activation="swiglu",
    router="linear",
    ffn="moe",
    head_dim=8,
    d_model=24,
    d_ff=20,
    dtype=torch.float32,
    tie=False,
    num_layers=2,
    vocab_size=270,
):
    """Return a model whose weights make experts and tokens differ, in the type that runners use in place."""
    routers = {
        "linear": {"kind": "linear", "gate_scale": 6.0},
        "mlp": {"kind": "mlp", "d_hidden": 8, "gates": "renormalized", "gate_scale": 2.0},
    }
    attentions = {
        "moa": {"kind": "moa", "num_experts": 3, "num_kv_heads": 2, "router": {**routers[router], "gate_scale": 3.0}},
        "gqa": {"kind": "gqa", "num_heads": 4, "num_kv_heads": 2},
    }
    ffns = {
        "moe": {"kind": "moe", "num_experts": 6, "router": routers[router]},
        "dense": {"kind": "dense"},
    }
    config = ModelConfig.model_validate(
        {
            "vocab_size": vocab_size,
            "d_model": d_model,
            "num_layers": num_layers,
            "max_seq_len": 160,
            "attention": {**attentions[attention], "head_dim": head_dim},
            "ffn": {**ffns[ffn], "d_ff": d_ff, "activation": activation},
            # Products keep the scale of what goes in, so that absolute tolerances mean something.
            "init_std": 1.5 * d_model**-0.5,
            "tie_embeddings": tie,
        }
    )
    model = Transformer(config, compute_dtype=dtype)
    initialize(model, config, seed=3)
    for name, parameter in model.named_parameters():
        if not name.endswith(("norm.weight", "router.proj.weight")):
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False)


def widen(model):
    """Return a copy of a model that computes in float32 with the same weights."""
    copy = Transformer(model.config)
    copy.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    return copy.requires_grad_(False)
