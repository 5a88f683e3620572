"""The compiled CPU kernels: built from ``cpu_kernels/`` at first use, kept in the user's cache, called by ctypes.

The structures here mirror ``cpu_kernels/model.h`` field by field; their sizes are compared when the library is loaded.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_void_p
from pathlib import Path
from typing import Any

import torch

from dsmoe_ray.errors import DsmoeError

SOURCES = Path(__file__).with_name("cpu_kernels")
BLOCK_SIZE = 16
"""Positions in one block of the KV cache, ``kBlockSize`` of the kernels."""
MAX_STREAMED = 6
"""Most inputs of a down projection whose sums go through memory, ``kStreamInputs`` of the kernels."""
_SUM_BLOCK = 256
PORTABLE = "portable"
"""Value of ``DSMOE_CPU_KERNELS`` that builds for any processor of this architecture."""
OFF = "off"
"""Value of ``DSMOE_CPU_KERNELS`` that never builds: everything runs in PyTorch."""
_FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-shared", "-fPIC")
_COMPILERS = ("g++", "c++", "clang++")
_BUILD_TIMEOUT_S = 600


class KernelsUnavailableError(DsmoeError):
    """This machine cannot build or load the kernels; everything also runs without them."""


class Rule(Structure):
    """One routing rule of one part of one layer."""

    _fields_ = [("mode", c_int32), ("top_k", c_int32), ("value", c_float)]


class RouterWeights(Structure):
    """A router; ``num_experts`` is 0 where there is none."""

    _fields_ = [
        *((name, c_void_p) for name in ("hidden", "proj")),
        *((name, c_int32) for name in ("d_hidden", "num_experts")),
        ("gate_scale", c_float),
        ("renormalize", c_int32),
    ]


class LayerWeights(Structure):
    """Weights and cache of one layer, without its FFN experts."""

    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "ffn_norm", "wq", "wk", "wv", "wo")),
        *((name, RouterWeights) for name in ("attention_router", "ffn_router")),
        *((name, c_void_p) for name in ("k_cache", "v_cache")),
    ]


class Model(Structure):
    """Sizes of a model and the weights that are not a layer's."""

    _fields_ = [
        *((name, c_int32) for name in ("dtype", "d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim")),
        *((name, c_int32) for name in ("heads_interleaved", "vocab_size", "num_threads", "mean_over_step")),
        ("norm_eps", c_float),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("layers", POINTER(LayerWeights)),
        *((name, c_void_p) for name in ("embedding", "head", "norm")),
    ]


DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"gelu": 0, "swiglu": 1}

STEP_INPUTS = ("tokens", "query_starts", "first_positions", "block_tables", "rule_idxs", "rules")
STEP_MEMORY = (
    *("x", "normed", "normed_cast", "q", "kv", "attended", "router_hidden", "router_probs", "attention_gates"),
    *("expert_ids", "gates", "sequence_of", "tiles", "rule_top_k", "partial"),
)


class Step(Structure):
    """The tokens of one step, and memory to work in."""

    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "num_sequences", "max_blocks", "num_rules")),
        *((name, c_void_p) for name in (*STEP_INPUTS, "y", *STEP_MEMORY, "routing_s")),
    ]


class ExpertWeights(Structure):
    """The FFN experts of one layer."""

    _fields_ = [
        *((name, c_int32) for name in ("dtype", "d_model", "d_ff", "num_experts", "activation", "num_threads")),
        *((name, c_void_p) for name in ("w1", "w2", "w3")),
    ]


class ExpertCall(Structure):
    """Tokens for the experts of one layer, and memory to work in."""

    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "stride")),
        *((name, c_void_p) for name in ("expert_ids", "gates", "x", "y", "hidden")),
        *((name, c_void_p) for name in ("expert_starts", "pair_tokens", "pair_gates", "active_experts")),
        ("num_active", c_void_p),
        *((name, c_void_p) for name in ("partial_starts", "partial", "routing_s")),
    ]


_STRUCTURES = (Rule, RouterWeights, LayerWeights, Model, Step, ExpertWeights, ExpertCall)


@functools.cache
def load_kernels(variant: str | None = None) -> ctypes.CDLL:
    """Return the library, building it if this is the first use of these sources on this machine.

    Args:
        variant: ``portable`` or ``off``; by default what the environment variable ``DSMOE_CPU_KERNELS`` says, and
            without it a build for the processor at hand.

    Raises:
        KernelsUnavailableError: there is no compiler, or it fails; says which and how.
    """
    variant = variant or os.environ.get("DSMOE_CPU_KERNELS", "")
    if variant == OFF:
        raise KernelsUnavailableError("CPU kernels are switched off by DSMOE_CPU_KERNELS=off")
    path = _build(["-march=native"] if variant != PORTABLE else [])
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsUnavailableError(f"{path} cannot be loaded: {error}") from error
    _declare(library)
    return library


def _build(machine_flags: list[str]) -> Path:
    compiler = next(
        (found for name in (os.environ.get("CXX"), *_COMPILERS) if name and (found := shutil.which(name))), ""
    )
    if not compiler:
        raise KernelsUnavailableError(
            f"no C++ compiler: none of {', '.join(_COMPILERS)} is installed and CXX is not set"
        )
    flags = [*_FLAGS, *machine_flags]
    path = _cache_directory() / f"cpu_kernels-{_digest(compiler, flags)}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        command = [compiler, *flags, "-o", str(built), str(SOURCES / "library.cpp")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelsUnavailableError(f"the compiler {compiler} did not run: {error}") from error
        if done.returncode != 0:
            raise KernelsUnavailableError(f"{compiler} failed on the CPU kernels: {done.stderr.strip()[-2000:]}")
        # Two processes may build at once; the last one wins, and both have the same file.
        built.replace(path)
    return path


def _digest(compiler: str, flags: list[str]) -> str:
    """Name a build by all that goes into it: another processor, compiler or source gives another file."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    stat = os.stat(compiler)
    digest.update(repr((compiler, stat.st_size, stat.st_mtime_ns, flags, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Return what tells processors with different instructions apart."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dsmoe_ray"


def _declare(library: ctypes.CDLL) -> None:
    sizes = (c_int32 * 16)()
    count = library.dsmoe_struct_sizes(sizes)
    expected = [ctypes.sizeof(structure) for structure in _STRUCTURES]
    assert list(sizes[:count]) == expected, f"structures differ: {list(sizes[:count])}, expected {expected}"
    library.dsmoe_embed.argtypes = [c_void_p, c_void_p]
    library.dsmoe_trunk.argtypes = [c_void_p, c_void_p, c_int32]
    library.dsmoe_experts.argtypes = [c_void_p, c_void_p]
    library.dsmoe_layers.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p]
    library.dsmoe_finish.argtypes = [c_void_p, c_void_p, c_void_p, c_int32, c_void_p]
    for name in ("embed", "trunk", "experts", "layers", "finish"):
        getattr(library, f"dsmoe_{name}").restype = None


def reference(structure: Structure | ctypes.Array[Any]) -> c_void_p:
    """Return a pointer to a structure, to be made once and passed many times."""
    return ctypes.cast(byref(structure), c_void_p)


def count_partial(num_inputs: int, size: int, num_columns: int) -> int:
    """Return how many floats the sums of ``num_inputs`` streamed inputs of a ``(size, num_columns)`` matrix take."""
    return num_inputs * -(-size // _SUM_BLOCK) * num_columns


def point(tensor: torch.Tensor) -> int:
    """Return where a tensor's numbers begin."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()
