"""What the benches train: model shapes, batches and the runs made of them. Pure data; imports no torch."""

from dataclasses import dataclass
from typing import Any, Literal

from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.training.config import TrainingRunConfig

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Workload:
    """A model and the batch it is trained on."""

    model: ModelConfig
    seq_len: int
    num_tokens_per_step: int


def _linear_router(**settings: Any) -> dict[str, Any]:
    return {"kind": "linear", **settings}


def _model(**sizes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"vocab_size": 4096, "max_seq_len": 512, "tie_embeddings": True, **sizes})


QUICKSTART = Workload(
    _model(
        d_model=256,
        num_layers=4,
        attention={
            "kind": "moa",
            "num_experts": 8,
            "num_kv_heads": 1,
            "head_dim": 32,
            "router": _linear_router(gate_scale=8.0),
        },
        ffn={
            "kind": "moe",
            "num_experts": 32,
            "d_ff": 32,
            "activation": "gelu",
            "router": {"kind": "mlp", "d_hidden": 64, "gate_scale": 32.0},
        },
    ),
    seq_len=256,
    num_tokens_per_step=4096,
)
"""Sizes and batch of ``examples/quickstart.yaml``."""

LARGE = Workload(
    _model(
        d_model=512,
        num_layers=6,
        attention={
            "kind": "moa",
            "num_experts": 8,
            "num_kv_heads": 1,
            "head_dim": 64,
            "router": _linear_router(gate_scale=8.0),
        },
        ffn={
            "kind": "moe",
            "num_experts": 32,
            "d_ff": 64,
            "activation": "swiglu",
            "router": _linear_router(gate_scale=32.0),
        },
    ),
    seq_len=512,
    num_tokens_per_step=2048,
)
"""Wider, gated experts: a step of about half the time in FFN GEMMs too large for a cache."""

GPU = Workload(
    _model(
        d_model=2048,
        num_layers=8,
        vocab_size=51200,
        max_seq_len=2048,
        attention={
            "kind": "moa",
            "num_experts": 16,
            "num_kv_heads": 2,
            "head_dim": 64,
            "router": {"kind": "mlp", "d_hidden": 512, "gate_scale": 16.0},
        },
        ffn={
            "kind": "moe",
            "num_experts": 32,
            "d_ff": 256,
            "activation": "gelu",
            "router": {"kind": "mlp", "d_hidden": 512, "gate_scale": 32.0},
        },
    ),
    seq_len=2048,
    num_tokens_per_step=16384,
)
"""A third of the layers of DS-MoE-1B."""

GRANITE = Workload(
    _model(
        d_model=256,
        num_layers=4,
        attention={"kind": "gqa", "num_heads": 8, "num_kv_heads": 1, "head_dim": 32},
        ffn={
            "kind": "moe",
            "num_experts": 32,
            "d_ff": 32,
            "activation": "swiglu",
            "router": _linear_router(gates="renormalized"),
        },
    ),
    seq_len=256,
    num_tokens_per_step=4096,
)
"""The quickstart's sizes in the terms of GraniteMoe: plain attention, gated experts, linear routers."""

JETMOE = Workload(
    _model(
        d_model=256,
        num_layers=4,
        attention={
            "kind": "moa",
            "num_experts": 8,
            "num_kv_heads": 1,
            "head_dim": 32,
            "router": _linear_router(gates="renormalized"),
        },
        ffn={
            "kind": "moe",
            "num_experts": 8,
            "d_ff": 128,
            "activation": "swiglu",
            "router": _linear_router(gates="renormalized"),
        },
    ),
    seq_len=256,
    num_tokens_per_step=4096,
)
"""The same in the terms of JetMoe, which has as many attention experts as FFN experts."""

WORKLOADS = {"quickstart": QUICKSTART, "large": LARGE, "gpu": GPU, "granite": GRANITE, "jetmoe": JETMOE}


def build_run(
    workload: Workload,
    *,
    model: ModelConfig | None = None,
    dtype: Dtype = "float32",
    ep: int = 1,
    num_threads: int = 1,
    sections: dict[str, Any] | None = None,
) -> TrainingRunConfig:
    """Return the run that trains a workload.

    Args:
        workload: What to train.
        model: In place of the workload's, on the same batch; the dense twin, say.
        dtype: Compute type.
        ep: Ranks that share out the experts.
        num_threads: Compute threads of each rank.
        sections: Whole keys to replace, by ``section.key``.
    """
    values: dict[str, Any] = {
        "run": {"name": "bench", "dir": "runs/bench"},
        "model": (model or workload.model).model_dump(mode="json"),
        "data": {"paths": ["unused"]},
        "parallel": {"ep": ep, "cpus_per_shard": num_threads, "timeout_s": 60.0},
        "train": {
            "steps": 1_000_000,
            "seq_len": workload.seq_len,
            "num_tokens_per_step": workload.num_tokens_per_step,
            "lr": 1.0e-3,
            "lr_schedule": {"warmup_steps": 100},
            "loss": {"mutual_information_attention": 1.0e-3, "mutual_information_ffn": 1.0e-2},
            "dtype": dtype,
        },
    }
    for key, value in (sections or {}).items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value
    return TrainingRunConfig.model_validate(values)
