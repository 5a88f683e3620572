"""The machine a bench runs on: what it is, how busy, and how fast its matrix products are."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.sides import synchronize
from dsmoe_ray.clock import monotonic_s

_GEMM_SIZE = {"cpu": 1536, "cuda": 8192}
_GEMM_REPEATS = 8


def describe_machine(settings: Settings) -> dict[str, Any]:
    """Return its make, versions, load, and GEMM rates with the threads that the bench uses."""
    device = torch.device(settings.device)
    return {
        "cpu": read_cpu_model(),
        "cores": os.cpu_count(),
        "threads": settings.num_threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "memory_gib": round(_total_memory_bytes() / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemm_gflops": {
            str(dtype).removeprefix("torch."): round(measure_gemm_gflops(device, dtype), 1)
            for dtype in (torch.float32, torch.bfloat16)
        },
        "load_average": list(os.getloadavg()),
    }


def measure_gemm_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the rate of the fastest of several square matrix products: what a step's GEMMs could reach at best."""
    size = _GEMM_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    durations_s = []
    for _ in range(_GEMM_REPEATS):
        synchronize(device)
        start_s = monotonic_s()
        a @ b
        synchronize(device)
        durations_s.append(monotonic_s() - start_s)
    return 2.0 * size**3 / min(durations_s) / 1e9


def read_cpu_model() -> str:
    """Return the processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _total_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
