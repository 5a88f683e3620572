"""One rank of a side in a process of its own: ``python -m dsmoe_ray.bench.worker``, driven by ``worker_side.py``.

Reads JSON lines and answers each with one. The first line says what to train; then come requests to do steps. While it
waits for a line it uses no CPU, so the other side has the machine to itself.
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

from dsmoe_ray.bench.sides import TrainerSide
from dsmoe_ray.parallel.collectives import join_world, leave_world
from dsmoe_ray.training.config import TrainingRunConfig

_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")


def serve(requests: TextIO, answers: TextIO) -> None:
    """Build the rank that the first line describes and answer requests until they end."""
    job = json.loads(requests.readline())
    torch.set_num_threads(job["num_threads"])
    device = torch.device(job["device"])
    config = TrainingRunConfig.model_validate(job["config"])
    empty_bytes = read_memory(device)["now_bytes"]
    world = join_world(config.parallel, rank=job["rank"], address="127.0.0.1", port=job["port"], device=device)
    side = TrainerSide(config, world=world)
    _answer(answers, {"ready": True})
    for line in requests:
        request = json.loads(line)
        if "steps" in request:
            _answer(answers, {"duration_s": side.run(request["steps"])})
        else:
            _answer(answers, {"empty_bytes": empty_bytes, **measure_peak(side, request["peak_of_steps"], device)})
    leave_world()


def measure_peak(side: TrainerSide, num_steps: int, device: torch.device) -> dict[str, int]:
    """Return the most memory these steps held at a time, and what was held before them."""
    return_free_memory()
    before_bytes = read_memory(device)["now_bytes"]
    reset_peak(device)
    side.run(num_steps)
    return {"before_bytes": before_bytes, "peak_bytes": read_memory(device)["peak_bytes"]}


def read_memory(device: torch.device) -> dict[str, int]:
    """Return the memory held now and at most since the last reset: by tensors on a GPU, by this process on a CPU."""
    if device.type == "cuda":
        return {
            "now_bytes": torch.cuda.memory_allocated(device),
            "peak_bytes": torch.cuda.max_memory_allocated(device),
        }
    fields = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="ascii").splitlines() if ":" in line)
    return {"now_bytes": _kib(fields["VmRSS"]), "peak_bytes": _kib(fields["VmHWM"])}


def reset_peak(device: torch.device) -> None:
    """Begin to watch for the highest point anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # See "clear_refs" in proc(5): 5 sets the peak resident size to the current one.
        _RESET_PEAK.write_text("5", encoding="ascii")


def return_free_memory() -> None:
    """Give what the C library keeps of freed memory back to the system; it would count as held between steps."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _kib(text: str) -> int:
    return int(text.split(maxsplit=1)[0]) * 1024


def _answer(answers: TextIO, values: dict[str, Any]) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
