"""The README's first command, with fewer steps: train, compare routing settings, generate."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STEPS = 12


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_leaves_everything_it_promises(tmp_path):
    run_dir = tmp_path / "run"
    options = {"train.steps": STEPS, "train.eval_every": 6, "checkpoint.every_steps": 6}
    result = subprocess.run(
        ["bash", "examples/quickstart.sh", *(f"--set={key}={value}" for key, value in options.items())],
        cwd=ROOT,
        env={**os.environ, "RUN_DIR": str(run_dir), "EVAL_TOKENS": "4096"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5, "the model learned nothing"
    assert {"loss", "tokens", "step_time_s"} <= rows[0].keys()
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    (shards,) = [event for event in events if event["event"] == "shards"]
    assert len(set(shards["process_ids"])) == 2, "two actors must have trained"
    for name in ("config.yaml", "plots/loss.png", "plots/routing.png", "artifact/manifest.json"):
        assert (run_dir / name).stat().st_size > 0
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())][-1] == f"step-{STEPS:08d}"
    _, _, told = result.stdout.partition("Held-out perplexity under several routing settings:\n")
    table, _, told = told.partition("Generated with the deployed sparse routing, after this prompt:\n")
    perplexities = {words[0]: float(words[1]) for words in map(str.split, table.splitlines()[2:]) if words}
    assert {"dense", "top_k=16", "top_k=8", "top_k=4", "threshold=0.48", "threshold=1.0"} <= perplexities.keys()
    assert all(1.0 < perplexity < 4096.0 for perplexity in perplexities.values())
    generated, _, next_steps = told.partition("\nLeft in ")
    prompt = "def read_lines(path):\n    "
    assert generated.startswith(prompt)
    assert generated.removeprefix(prompt).strip(), "nothing was generated"
    assert str(run_dir) in next_steps
