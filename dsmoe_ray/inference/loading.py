"""From an artifact to a model or an engine that is ready to run."""

import logging
from collections.abc import Callable
from typing import Literal

import torch

from dsmoe_ray.artifact.load import Artifact
from dsmoe_ray.errors import ConfigError
from dsmoe_ray.inference.config import EngineConfig
from dsmoe_ray.inference.cpu_library import BLOCK_SIZE, KernelsUnavailableError, load_kernels
from dsmoe_ray.inference.cpu_runner import CpuRunner, count_block_bytes
from dsmoe_ray.inference.engine import Engine
from dsmoe_ray.inference.int8_weights import pack_model
from dsmoe_ray.inference.published_tokenizer import build_tokenizer
from dsmoe_ray.inference.runner import ModelRunner
from dsmoe_ray.inference.sparse_experts import experts_of
from dsmoe_ray.inference.torch_runner import TorchRunner
from dsmoe_ray.model.config import MoeConfig
from dsmoe_ray.model.dispatch import ExpertBackend
from dsmoe_ray.model.rope import compute_rotations
from dsmoe_ray.model.transformer import Transformer

DtypeName = Literal["auto", "float32", "bfloat16"]

_logger = logging.getLogger(__name__)

# What the CPU kernels compute in.
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16)
# Read in float32 whatever the rest is computed in.
_FLOAT32_WEIGHTS = ("norm.weight", "router.proj.weight")


def load_model(
    artifact: Artifact, *, device: torch.device | None = None, dtype: DtypeName = "auto", with_experts: bool = True
) -> Transformer:
    """Return the artifact's model with its verified weights, for inference.

    Weights of the wanted type are used where they lie in the mapped files of the artifact.

    Args:
        artifact: See ``artifact/load.py``.
        device: By default a GPU if there is one.
        dtype: What it computes in; ``auto`` takes bfloat16 on a GPU and the type of the stored weights on a CPU.
        with_experts: False for a model whose FFN experts are computed elsewhere: theirs are tensors without memory
            (``meta``), and nothing of them is read.

    Raises:
        ArtifactError: a tensor does not match its digest.
        ConfigError: there are no experts to be elsewhere.
    """
    if not with_experts and not isinstance(artifact.model_config.ffn, MoeConfig):
        raise ConfigError(
            f"{artifact.directory} is a model with a dense FFN: it has no experts that could be computed elsewhere. "
            "Serve it with hosts.count: 0."
        )
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = artifact.load_state_dict(with_experts=with_experts)
    compute_dtype = _choose_dtype(dtype, device, stored=tensors["embedding.weight"].dtype)
    config = artifact.model_config
    with torch.device("meta"):
        model = Transformer(config, compute_dtype=compute_dtype)
    state = {
        name: tensor.to(device, torch.float32 if name.endswith(_FLOAT32_WEIGHTS) else compute_dtype)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(state, assign=True, strict=with_experts)
    artifact.release_pages()
    cos, sin = compute_rotations(config.max_seq_len, config.attention.head_dim, config.rope_theta)
    model.cos, model.sin = cos.to(device), sin.to(device)
    return model.eval().requires_grad_(False)


def load_model_to_measure(artifact: Artifact) -> Transformer:
    """Return the artifact's model as its quality is measured: in float32 on a CPU, in bfloat16 on a GPU.

    Raises:
        ArtifactError: a tensor does not match its digest.
    """
    return load_model(artifact, dtype="auto" if torch.cuda.is_available() else "float32")


def load_engine(
    artifact: Artifact,
    config: EngineConfig | None = None,
    *,
    device: torch.device | None = None,
    experts: ExpertBackend | None = None,
) -> Engine:
    """Return an engine that runs the artifact's model.

    Args:
        artifact: See ``artifact/load.py``.
        config: By default all defaults.
        device: By default a GPU if there is one.
        experts: Who computes FFN experts, whose weights are then not read; by default this process.

    Raises:
        ArtifactError: a tensor does not match its digest.
        ConfigError: the configuration does not fit the model or the machine.
    """
    config = config or EngineConfig()
    model = load_model(
        artifact,
        device=device,
        # What is rounded to int8 is rounded from what was published.
        dtype="auto" if config.dtype == "int8" else config.dtype,
        with_experts=experts is None,
    )
    tokenizer = build_tokenizer(artifact.side_files)
    runner = build_runner(model, config, experts=experts, release_pages=artifact.release_pages)
    return Engine(runner, tokenizer, config)


def choose_numerics(config: EngineConfig, device: torch.device) -> Literal["exact", "fast"]:
    """Return what ``numerics: auto`` means on a device."""
    if config.numerics != "auto":
        return config.numerics
    return "exact" if device.type == "cpu" else "fast"


def build_runner(
    model: Transformer,
    config: EngineConfig,
    *,
    experts: ExpertBackend | None = None,
    release_pages: Callable[[], None] = lambda: None,
) -> ModelRunner:
    """Return the fastest runner for the device that a model is on.

    Args:
        model: See ``load_model``.
        config: Of the engine.
        experts: Who computes FFN experts; by default this process.
        release_pages: Called where weights in mapped files were copied and are not needed any more.

    Raises:
        ConfigError: the configuration does not fit the model or the machine.
    """
    device = model.embedding.weight.device
    numerics = choose_numerics(config, device)
    if device.type == "cpu":
        try:
            return _build_cpu_runner(model, config, numerics, experts, release_pages)
        except KernelsUnavailableError as error:
            if config.dtype == "int8":
                raise ConfigError(
                    f"dtype=int8 needs the compiled CPU kernels: {error}. Or set dtype to auto."
                ) from error
            _logger.warning("running in PyTorch, which is several times slower: %s", error)
    if config.dtype == "int8":
        raise ConfigError(f"dtype=int8 is for a CPU only, and the model is on {device}. Set dtype to bfloat16.")
    attention = model.config.attention
    positions_bytes = 2 * model.config.num_layers * attention.num_kv_heads * attention.head_dim
    num_blocks = config.compute_num_blocks(
        bytes_per_block=positions_bytes * config.block_size * model.compute_dtype.itemsize,
        max_seq_len=model.config.max_seq_len,
    )
    return TorchRunner(model, num_blocks=num_blocks, block_size=config.block_size, numerics=numerics, experts=experts)


def _build_cpu_runner(
    model: Transformer,
    config: EngineConfig,
    numerics: Literal["exact", "fast"],
    experts: ExpertBackend | None,
    release_pages: Callable[[], None],
) -> CpuRunner:
    if config.block_size != BLOCK_SIZE:
        raise ConfigError(
            f"block_size={config.block_size}: on a CPU a block has {BLOCK_SIZE} positions. Leave block_size out."
        )
    stored = model.embedding.weight.dtype
    if stored not in _COMPUTE_DTYPES:
        allowed = " or ".join(str(dtype) for dtype in _COMPUTE_DTYPES)
        raise ConfigError(
            f"the model's weights are {stored}: on a CPU an engine computes in {allowed}. Set dtype to float32."
        )
    is_int8 = config.dtype == "int8"
    if is_int8 and experts is not None:
        raise ConfigError(
            "dtype=int8 computes experts in the process that has the rest of the model. Set dtype to bfloat16, or "
            "hosts.count to 0."
        )
    load_kernels()
    cache_dtype = torch.bfloat16 if is_int8 else model.compute_dtype
    num_blocks = config.compute_num_blocks(
        bytes_per_block=count_block_bytes(model.config, cache_dtype), max_seq_len=model.config.max_seq_len
    )
    return CpuRunner(
        model,
        num_blocks=num_blocks,
        max_tokens=config.max_batched_tokens,
        max_seqs=config.max_num_seqs,
        numerics=numerics,
        experts=experts,
        int8=pack_model(model, experts_of(model), after_layer=release_pages) if is_int8 else None,
    )


def _choose_dtype(dtype: DtypeName, device: torch.device, *, stored: torch.dtype) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    return stored if device.type == "cpu" else torch.bfloat16
