"""Start ``transformers_side.py`` under one of the two versions of ``transformers`` and read what it wrote."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.fakes import transformers_side

# tests/run.sh puts it there; the newer one is a package of the environment itself.
OLD = Path(sys.prefix) / "transformers-4.57"
VERSIONS = {"5": "", "4.57": str(OLD)}


def run_jobs(version: str, jobs: list[dict[str, Any]], directory: Path) -> None:
    """Do all jobs in one process, as starting it takes longer than most of them."""
    if not (OLD.is_dir() if version == "4.57" else find_spec("transformers")):
        pytest.skip(f"transformers {version} is not installed; `bash tests/run.sh` does it")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, str(transformers_side.__file__), str(path)],
        env={**os.environ, "PYTHONPATH": VERSIONS[version], "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def read_outcome(job: dict[str, Any]) -> dict[str, Any]:
    """Return what a job found out: what it wrote as text, and its tensors."""
    return {**json.loads(Path(f"{job['out']}.json").read_text()), **load_file(f"{job['out']}.safetensors")}
