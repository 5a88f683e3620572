"""What this machine has and lacks for training and inference.

Looks only: starts no Ray, no process group, no CUDA context.

Every check returns one ``Finding``: what was seen and, unless all is well, what to do about it.
"""

import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

GIB = 2**30
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 12)
OLDEST_TORCH = (2, 11)
RAY_SERIES = (2, 60)


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``warning``: works, but slower or with less; ``failure``: something will not work."""

    name: str
    status: Literal["ok", "warning", "failure"]
    found: str
    advice: str = ""


def examine_machine(directory: Path) -> list[Finding]:
    """Run all checks; ``directory`` is where runs would be written."""
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_torch,
        check_ray,
        check_cpus,
        check_memory,
        check_shared_memory,
        lambda: check_disk(directory),
        check_gpus,
        check_collectives,
        check_loopback,
        check_open_files,
        check_compiler,
    ]
    return [check() for check in checks]


def check_python() -> Finding:
    """Look at the interpreter's version."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return Finding("python", "ok", found)
    return Finding("python", "warning", found, "Tested with 3.11 and 3.12; make the environment with one of them.")


def check_torch() -> Finding:
    """Look at the installed PyTorch without importing it."""
    version = _installed_version("torch")
    if version is None:
        return Finding("torch", "failure", "not installed", "pip install torch")
    if _leading_numbers(version) < OLDEST_TORCH:
        return Finding("torch", "failure", version, f"Install torch {_dotted(OLDEST_TORCH)} or newer.")
    return Finding("torch", "ok", version)


def check_ray() -> Finding:
    """Look at the installed Ray without importing it."""
    version = _installed_version("ray")
    if version is None:
        advice = "pip install 'ray[default,data]'. Training on actors and preparing data need it; inference does not."
        return Finding("ray", "warning", "not installed", advice)
    if _leading_numbers(version) != RAY_SERIES:
        return Finding("ray", "warning", version, f"Tested with {_dotted(RAY_SERIES)}.x; install that series.")
    return Finding("ray", "ok", version)


def check_cpus() -> Finding:
    """Compare the cores this process may use with the threads it would start."""
    usable = _usable_cpus()
    threads = os.environ.get("OMP_NUM_THREADS")
    found = f"{usable:g} usable of {os.cpu_count()}; OMP_NUM_THREADS {threads or 'not set'}"
    if threads is not None and threads.isdigit() and int(threads) > usable:
        return Finding("cpus", "warning", found, "More threads than cores slow every step; unset OMP_NUM_THREADS.")
    if usable < 2:
        advice = "Two shards will share one core; use parallel.ep=1 for full speed."
        return Finding("cpus", "warning", found, advice)
    return Finding("cpus", "ok", found)


def check_memory() -> Finding:
    """Look at the memory that is free now, within the container's limit."""
    total, available = _memory_bytes()
    found = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    if available < 4 * GIB:
        return Finding("memory", "warning", found, "The quickstart wants 4 GiB free; raise the limit.")
    return Finding("memory", "ok", found)


def check_shared_memory() -> Finding:
    """Look at /dev/shm, where Ray keeps its objects."""
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("shared memory", "warning", "no /dev/shm", "Ray will keep objects in /tmp, which is slower.")
    usage = shutil.disk_usage(path)
    found = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} in /dev/shm"
    if usage.free < GIB:
        advice = "Give the container more (docker run --shm-size=2g), or Ray falls back to files in /tmp."
        return Finding("shared memory", "warning", found, advice)
    return Finding("shared memory", "ok", found)


def check_disk(directory: Path) -> Finding:
    """Look at the disk that holds ``directory``."""
    usage = shutil.disk_usage(directory)
    found = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} at {directory}"
    if usage.free < 5 * GIB:
        return Finding("disk", "warning", found, "Shards and checkpoints need room; point run.dir elsewhere.")
    # Ray refuses to create objects on a file system this full.
    if usage.used / usage.total > 0.95:
        return Finding("disk", "warning", found, "Ray stops spilling objects above 95% use; free some space.")
    return Finding("disk", "ok", found)


def check_gpus() -> Finding:
    """Count the GPUs that PyTorch can use, and explain a driver whose GPUs it cannot."""
    torch = _import_if_there("torch")
    count = torch.cuda.device_count() if torch is not None else 0
    if count:
        return Finding("gpu", "ok", f"{count} visible, CUDA {torch.version.cuda}")
    if not Path("/proc/driver/nvidia/version").exists():
        return Finding("gpu", "ok", "none; training and inference run on the CPU")
    advice = "Install a CUDA build of torch, and check CUDA_VISIBLE_DEVICES and the container's GPU option."
    return Finding("gpu", "warning", "an NVIDIA driver is loaded, but torch sees no GPU", advice)


def check_collectives() -> Finding:
    """Ask PyTorch which collective backends it was built with."""
    distributed = _import_if_there("torch.distributed")
    if distributed is None or not distributed.is_available():
        return Finding("collectives", "failure", "torch.distributed is absent", "Install a torch build that has it.")
    gloo, nccl = distributed.is_gloo_available(), distributed.is_nccl_available()
    found = f"gloo {'yes' if gloo else 'no'}, nccl {'yes' if nccl else 'no'}"
    if not gloo:
        return Finding("collectives", "failure", found, "CPU ranks need gloo; install a torch build that has it.")
    return Finding("collectives", "ok", found)


def check_loopback() -> Finding:
    """Bind and release a port on the loopback address."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            with socket.create_connection(listener.getsockname(), timeout=5):
                return Finding("loopback", "ok", "127.0.0.1 binds and answers")
    except OSError as error:
        advice = "Ranks meet over TCP: allow local connections in the sandbox or firewall."
        return Finding("loopback", "failure", str(error), advice)


def check_open_files() -> Finding:
    """Look at how many files and sockets one process may hold open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        return Finding("open files", "warning", f"limit {soft}, at most {hard}", "Ray needs many; run: ulimit -n 65536")
    return Finding("open files", "ok", f"limit {soft}")


def check_compiler() -> Finding:
    """Look for the C++ compiler that ``train.compile`` and the engine's CPU kernels need."""
    path = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if path is None:
        return Finding(
            "compiler",
            "warning",
            "none",
            "the engine runs several times faster with one, and train.compile needs it; apt install g++.",
        )
    return Finding("compiler", "ok", path)


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _leading_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+", maxsplit=1)[0].split(".")[:2] if part.isdigit())


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _import_if_there(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _usable_cpus() -> float:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0].isdigit():
        return min(affinity, int(quota[0]) / int(quota[1]))
    return affinity


def _memory_bytes() -> tuple[int, int]:
    """Return total and available bytes, both capped by the cgroup's limit."""
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in _read_lines(Path("/proc/meminfo"))}
    if not fields:
        pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return pages * page_bytes, pages * page_bytes
    total, available = fields["MemTotal"], fields["MemAvailable"]
    limit = _read_words(Path("/sys/fs/cgroup/memory.max"))
    used = _read_words(Path("/sys/fs/cgroup/memory.current"))
    if limit and used and limit[0].isdigit():
        total = min(total, int(limit[0]))
        available = min(available, int(limit[0]) - int(used[0]))
    return total, available


def _read_lines(path: Path) -> Iterator[str]:
    return iter(path.read_text().splitlines() if path.is_file() else ())


def _read_words(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []
