"""Fixtures of all tests. Imports neither torch nor Ray, so that a machine without one of them can run the rest."""

import copy
import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dsmoe_ray.config_io import apply_override, parse_config
from dsmoe_ray.training.config import TrainingRunConfig

# Before torch is first imported, here or in a process that a test starts: a second thread is no gain on tiny matrices,
# and on a busy machine the threads' waiting for each other costs ten times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TinyConfig = Callable[..., TrainingRunConfig]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def tiny_values(tmp_path: Path) -> dict[str, Any]:
    """Return the plain values of a run small enough to train a step in milliseconds; yours to change."""
    router = {"kind": "linear"}
    return {
        "run": {"name": "tiny", "dir": str(tmp_path / "run")},
        "model": {
            "vocab_size": 300,
            "d_model": 32,
            "num_layers": 2,
            "max_seq_len": 32,
            "attention": {"kind": "moa", "num_experts": 2, "num_kv_heads": 2, "head_dim": 8, "router": router},
            "ffn": {"kind": "moe", "num_experts": 4, "d_ff": 16, "activation": "gelu", "router": {**router}},
        },
        "data": {"paths": [str(tmp_path / "text")], "include": "*.txt"},
        "train": {
            "steps": 4,
            "seq_len": 16,
            "num_tokens_per_step": 128,
            "lr": 1.0e-3,
            "loss": {"mutual_information_attention": 1.0e-3, "mutual_information_ffn": 1.0e-3},
        },
    }


@pytest.fixture
def tiny_config(tiny_values: dict[str, Any]) -> TinyConfig:
    """Return a maker of tiny runs: ``tiny_config("parallel.ep=2", "train.steps=8")``."""

    def make(*overrides: str) -> TrainingRunConfig:
        values = copy.deepcopy(tiny_values)
        for override in overrides:
            apply_override(values, override)
        return parse_config(values, TrainingRunConfig, source="tiny_config")

    return make


@pytest.fixture
def text_dir(tmp_path: Path) -> Path:
    """Return a directory of small text files, enough for a tiny run; where ``tiny_config`` looks for its data."""
    directory = tmp_path / "text"
    directory.mkdir()
    for number in range(40):
        lines = [
            f"file {number} line {line}: the sum is {number + line}, the product {number * line}.\n"
            for line in range(20)
        ]
        (directory / f"{number:02d}.txt").write_text("".join(lines))
    return directory


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Start one small local Ray for all tests marked ``ray``, on loopback and without a dashboard; return its address.

    Four logical CPUs whatever the machine has: shards wait for each other more than they compute.
    """
    import ray

    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=256 * 2**20,
        log_to_driver=False,
        # Ray replaces 127.0.0.1 by the machine's outward address; other loopback addresses it takes as they are.
        _node_ip_address="127.0.0.2",
    )
    yield context.address_info["address"]
    ray.shutdown()


def _has_gpu() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
