"""The compiled CPU kernels: built from ``cpu_kernels/`` at first use, kept in the user's cache, called by ctypes.

The structures here mirror ``cpu_kernels/model.h`` field by field; their sizes and
the constants are compared when the library is loaded.
"""

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
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
"""Inputs that a down projection sums up at a time, ``kSumBlock`` of the kernels."""
PORTABLE = "portable"
"""Value of ``DSMOE_CPU_KERNELS`` that builds for any processor of this architecture."""
OFF = "off"
"""Value of ``DSMOE_CPU_KERNELS`` that never builds: everything runs in PyTorch."""
_FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("g++", "c++", "clang++")
"""Looked for in this order where CXX is not set."""
_BUILD_TIMEOUT_S = 600

_logger = logging.getLogger(__name__)


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
        *((name, c_void_p) for name in ("wq_scales", "wk_scales", "wv_scales", "wo_scales")),
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
        *((name, c_void_p) for name in ("embedding", "head", "head_scales", "norm")),
    ]


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
"""Of matrices. Those of int8 are packed; see ``int8_weights.py``."""
ACTIVATIONS = {"gelu": 0, "swiglu": 1}

STEP_INPUTS = ("tokens", "query_starts", "first_positions", "block_tables", "rule_idxs", "rules")
STEP_MEMORY = (
    *("x", "normed", "normed_cast", "q", "kv", "attended", "rounded", "rounded_scales"),
    *("router_hidden", "router_probs", "attention_gates"),
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
        *((name, c_void_p) for name in ("w1", "w2", "w3", "w1_scales", "w2_scales", "w3_scales")),
    ]


class ExpertCall(Structure):
    """Tokens for the experts of one layer, and memory to work in."""

    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "stride", "by_pair")),
        *((name, c_void_p) for name in ("expert_ids", "gates", "x", "y", "hidden", "hidden_scales")),
        *((name, c_void_p) for name in ("rounded", "rounded_scales")),
        *((name, c_void_p) for name in ("expert_starts", "pair_tokens", "pair_rows", "pair_gates")),
        *((name, c_void_p) for name in ("active_experts", "num_active")),
        *((name, c_void_p) for name in ("partial_starts", "partial", "routing_s")),
    ]


class PiecePlace(Structure):
    """Where the part of a call that one place computes lies."""

    _fields_ = [
        *((name, c_int32) for name in ("num_rows", "num_pairs", "width", "unused")),
        *((name, c_int64) for name in ("rows", "ids", "gates", "x")),
    ]


class PieceCut(Structure):
    """Tokens whose experts are elsewhere, to be cut into pieces."""

    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "stride", "row_bytes", "first_piece", "num_pieces")),
        *((name, c_void_p) for name in ("expert_ids", "gates", "x", "piece_of")),
        ("pieces", POINTER(PiecePlace)),
        ("memory", c_void_p),
    ]


_STRUCTURES = (Rule, RouterWeights, LayerWeights, Model, Step, ExpertWeights, ExpertCall, PiecePlace, PieceCut)


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
    flags = _FLAGS if variant == PORTABLE else (*_FLAGS, "-march=native")
    loaded = _load_once(flags, os.environ.get("CXX", ""), _find_cache_directory())
    if isinstance(loaded, str):
        raise KernelsUnavailableError(loaded)
    return loaded


@functools.cache
def _load_once(flags: tuple[str, ...], cxx: str, directory: Path | None) -> ctypes.CDLL | str:
    """Return the library, or why there is none: a build that failed is not tried again in this process."""
    try:
        path = _build(_find_compiler(cxx), flags, directory)
        library = ctypes.CDLL(str(path))
    except KernelsUnavailableError as error:
        return str(error)
    except OSError as error:
        return f"the CPU kernels cannot be built or loaded: {error}"
    _declare(library)
    return library


def _find_compiler(cxx: str) -> list[str]:
    """Return the compiler as the words of a command: what CXX says, else the first that is installed."""
    if cxx.strip():
        words = [cxx] if shutil.which(cxx) else cxx.split()
        if not shutil.which(words[0]):
            raise KernelsUnavailableError(
                f"CXX={cxx} names no program that can be run. Correct it, or unset it to use the first of "
                f"{', '.join(COMPILERS)} that is installed."
            )
        return words
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise KernelsUnavailableError(
            f"no C++ compiler: none of {', '.join(COMPILERS)} is installed and CXX is not set"
        )
    return [compiler]


def _build(compiler: list[str], flags: tuple[str, ...], directory: Path | None) -> Path:
    """Build the library, or find it built, in the cache; where that cannot be written, in a directory of our own."""
    name = f"cpu_kernels-{_digest(compiler, flags)}.so"
    with contextlib.ExitStack() as stack:
        try:
            if directory is None:
                raise FileNotFoundError("no home directory is known")
            if (directory / name).exists():
                return directory / name
            directory.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=directory))
        except OSError as error:
            _logger.warning(
                "the compiled CPU kernels cannot be kept for other processes: %s. Let XDG_CACHE_HOME be a directory "
                "that can be written.",
                error,
            )
            directory = _make_own_directory()
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=directory))
        built = Path(scratch) / name
        _compile(compiler, [*flags, "-o", str(built), str(SOURCES / "library.cpp")])
        # Two processes may build at once; the last one wins, and both have the same file.
        return built.replace(directory / name)


def _compile(compiler: list[str], arguments: list[str]) -> None:
    named = " ".join(compiler)
    try:
        done = subprocess.run(
            [*compiler, *arguments], capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"the compiler {named} did not run: {error}") from error
    if done.returncode != 0:
        raise KernelsUnavailableError(f"{named} failed on the CPU kernels: {done.stderr.strip()[-2000:]}")


@functools.cache
def _make_own_directory() -> Path:
    """Return a directory of this process, removed when it ends."""
    directory = Path(tempfile.mkdtemp(prefix="dsmoe_ray-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _digest(compiler: list[str], flags: tuple[str, ...]) -> str:
    """Name a build by all that goes into it: another processor, compiler or source gives another file."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    programs = [os.stat(found) for word in compiler if (found := shutil.which(word))]
    versions = [(program.st_size, program.st_mtime_ns) for program in programs]
    digest.update(repr((compiler, versions, flags, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:24]


def _processor() -> str:
    """Return what tells processors with different instructions apart."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _find_cache_directory() -> Path | None:
    """Return where builds are kept, or None where this user has no home."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "dsmoe_ray"
    try:
        return Path.home() / ".cache" / "dsmoe_ray"
    except RuntimeError:
        return None


def _declare(library: ctypes.CDLL) -> None:
    numbers = (c_int32 * 16)()
    count = library.dsmoe_layout(numbers)
    found = list(numbers[:count])
    expected = [*map(ctypes.sizeof, _STRUCTURES), BLOCK_SIZE, MAX_STREAMED, _SUM_BLOCK]
    assert found == expected, f"structures or constants differ: {found} in the kernels, expected {expected}"
    library.dsmoe_embed.argtypes = [c_void_p, c_void_p]
    library.dsmoe_trunk.argtypes = [c_void_p, c_void_p, c_int32]
    library.dsmoe_experts.argtypes = [c_void_p, c_void_p]
    library.dsmoe_layers.argtypes = [c_void_p, c_void_p, c_void_p, c_void_p]
    library.dsmoe_finish.argtypes = [c_void_p, c_void_p, c_void_p, c_int32, c_void_p]
    library.dsmoe_measure_pieces.argtypes = [c_void_p]
    library.dsmoe_cut_pieces.argtypes = [c_void_p]
    library.dsmoe_add_pieces.argtypes = [c_void_p, c_void_p, *[c_int32] * 4, c_void_p]
    for name in ("embed", "trunk", "experts", "layers", "finish", "cut_pieces", "add_pieces"):
        getattr(library, f"dsmoe_{name}").restype = None
    library.dsmoe_measure_pieces.restype = c_int64


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
