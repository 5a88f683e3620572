"""Generate with a model of random weights that is twice as large as the memory its process may use.

Publishes a model, drops it from the page cache, and runs ``dsmoe generate`` in a control group whose limit counts
mapped pages of files too. Needs root and the memory controller of cgroup version 1; prints one JSON object.

    python tests/performance/larger_than_memory.py SCRATCH_DIR [--max-tokens 32]
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from dsmoe_ray.artifact.layout import model_shapes
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from dsmoe_ray.data.tokenizer import train_tokenizer
from dsmoe_ray.model.config import ModelConfig
from dsmoe_ray.model.init import draw_initial

MODEL = ModelConfig.model_validate(
    {
        "vocab_size": 8192,
        "d_model": 1024,
        "num_layers": 16,
        "max_seq_len": 1024,
        "tie_embeddings": True,
        "init_std": 0.06,
        "attention": {"kind": "gqa", "num_heads": 16, "num_kv_heads": 4, "head_dim": 64},
        "ffn": {
            "kind": "moe",
            "num_experts": 128,
            "d_ff": 256,
            "activation": "swiglu",
            "router": {"kind": "linear", "gates": "renormalized", "inference": {"mode": "top_k", "top_k": 4}},
        },
    }
)
CONTROLLER = Path("/sys/fs/cgroup/memory")


def publish(directory):
    tokenizer = train_tokenizer(["bench"], vocab_size=MODEL.vocab_size)
    save_artifact(
        directory,
        model_config=MODEL,
        tensors=(
            (name, draw_initial(name, torch.Size(shape), MODEL, seed=0)) for name, shape in model_shapes(MODEL).items()
        ),
        tokenizer_json=tokenizer.to_json(),
        provenance={"weights": "random"},
        eos_token_id=tokenizer.end_of_text_id,
        dtype=torch.bfloat16,
    )


def drop_from_page_cache(directory):
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make_group(limit_bytes):
    """Return a new control group under this process's own."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":")[2] for line in lines if ":memory:" in line), None)
    if own is None:
        sys.exit("the memory controller of cgroup version 1 is not mounted: nothing can be limited here")
    group = CONTROLLER / own.lstrip("/") / f"larger-than-memory-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(limit_bytes))
    return group


def read_resident_bytes(pid):
    """Return (now, of it mapped files, peak) of a process; zeros once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0, 0
    found = {key: int(rest.split()[0]) << 10 for key, rest in (line.split(":") for line in lines if "kB" in line)}
    return found.get("VmRSS", 0), found.get("RssFile", 0), found.get("VmHWM", 0)


def run_in_group(group, command):
    """Run a command in the group; return its result and the highest figures seen."""
    seen = {"resident_bytes": 0, "resident_of_files_bytes": 0}
    join = ["sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group)]
    process = subprocess.Popen([*join, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def watch():
        while process.poll() is None:
            now, of_files, peak = read_resident_bytes(process.pid)
            seen["resident_bytes"] = max(seen["resident_bytes"], now, peak)
            seen["resident_of_files_bytes"] = max(seen["resident_of_files_bytes"], of_files)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    watcher.join()
    return process.returncode, out, err, seen


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    directory = arguments.scratch / "artifact"
    if not directory.exists():
        publish(directory)
    size_bytes = load_artifact(directory).size_bytes
    os.sync()
    drop_from_page_cache(directory)
    group = make_group(size_bytes // 2)
    command = [sys.executable, "-m", "dsmoe_ray", "generate", str(directory), "--prompt", "import os, sys"]
    started_s = time.monotonic()
    try:
        code, out, err, seen = run_in_group(group, [*command, "--max-tokens", str(arguments.max_tokens)])
        counted = {name: int((group / f"memory.{name}").read_text()) for name in ("max_usage_in_bytes", "failcnt")}
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    finally:
        group.rmdir()
    report = {
        "exit_code": code,
        "weights_bytes": size_bytes,
        "limit_bytes": size_bytes // 2,
        **seen,
        "group_most_bytes": counted["max_usage_in_bytes"],
        "times_at_limit": counted["failcnt"],
        "pages_read_from_disk": int(stat.get("pgmajfault", 0)),
        "seconds": round(time.monotonic() - started_s, 1),
        "printed_characters": len(out),
        "stderr": err.strip().splitlines()[-2:],
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
