"""lm-evaluation-harness scores a running server by its own client exactly as it scores the engine offline."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsmoe_ray.artifact.save import save_artifact
from tests.fakes import gateway_server
from tests.fakes.gateway_server import run_gateway
from tests.fakes.stock_models import EXPORTS, draw_weights, make_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIDE = Path(gateway_server.__file__).with_name("lm_eval_server_side.py")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Return what the harness found, by side."""
    missing = [name for name in ("lm_eval", "transformers", "accelerate", "tenacity") if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; the extra dev holds them")
    directory, case, tokenizer = tmp_path_factory.mktemp("lm_eval"), EXPORTS["jetmoe"], make_tokenizer()
    save_artifact(
        directory / "artifact",
        model_config=case.config,
        tensors=draw_weights(case.config),
        tokenizer_json=tokenizer.to_json(),
        provenance={},
        generation_config={"eos_token_id": tokenizer.end_of_text_id},
    )
    out = directory / "found.json"
    environment = os.environ | OFFLINE | {"HF_HOME": str(directory / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with run_gateway(directory / "artifact") as server:
        done = subprocess.run(
            [sys.executable, str(SIDE), str(directory / "artifact"), server.url, str(out)],
            env=environment,
            cwd=SIDE.with_name("lm_eval_tasks"),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize("way", ["one at a time", "many at once"])
def test_every_sample_has_the_score_it_has_offline(sides, way):
    found, offline = sides[way], sides["offline"]
    assert found["samples"] == offline["samples"]
    assert set(offline["samples"]) == {"dsmoe_choice", "dsmoe_completion", "dsmoe_perplexity"}
    for task, metrics in offline["results"].items():
        assert found["results"][task] == metrics
