"""lm-evaluation-harness gives one score to our engine, to the exported model and to the training side's model.

Tasks and data are local files. Accuracies and generated texts are equal; log probabilities are sums over up to 400
tokens of float32 values that agree to some 1e-5 each.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsmoe_ray.artifact.hugging_face.export import export_model
from dsmoe_ray.artifact.hugging_face.export_plan import plan_export
from dsmoe_ray.artifact.load import load_artifact
from dsmoe_ray.artifact.save import save_artifact
from tests.fakes import other_transformers
from tests.fakes.stock_models import EXPORTS, draw_weights, make_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIDE = Path(other_transformers.__file__).with_name("lm_eval_side.py")
TASKS = SIDE.with_name("lm_eval_tasks")
OTHERS = pytest.mark.parametrize("other", ["exported", "forward"])
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_EVALUATE_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="module", params=["jetmoe", "mixtral"])
def sides(request, tmp_path_factory):
    """Return what the harness found, by side."""
    if not (find_spec("lm_eval") and find_spec("transformers") and find_spec("accelerate")):
        pytest.skip("lm_eval, transformers or accelerate is not installed; the extra dev holds them")
    directory, case, tokenizer = tmp_path_factory.mktemp("lm_eval"), EXPORTS[request.param], make_tokenizer()
    save_artifact(
        directory / "artifact",
        model_config=case.config,
        tensors=draw_weights(case.config),
        tokenizer_json=tokenizer.to_json(),
        provenance={},
        generation_config={"eos_token_id": tokenizer.end_of_text_id},
    )
    artifact = load_artifact(directory / "artifact")
    export_model(artifact, directory / "stock", plan_export(artifact.model_config, case.kind))
    arguments = [str(directory / name) for name in ("artifact", "stock", "found.json")]
    environment = os.environ | OFFLINE | {"HF_HOME": str(directory / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(SIDE), *arguments],
        env=environment,
        cwd=TASKS,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((directory / "found.json").read_text())


@OTHERS
def test_choices_get_equal_accuracies_and_like_log_probabilities(sides, other):
    ours, theirs = sides["engine"], sides[other]
    found = ours["results"]["dsmoe_choice"]
    assert 0 < found["acc,none"] < 1
    for metric in ("acc,none", "acc_norm,none"):
        assert found[metric] == theirs["results"]["dsmoe_choice"][metric]
    pairs = list(zip(ours["samples"]["dsmoe_choice"], theirs["samples"]["dsmoe_choice"], strict=True))
    assert len(pairs) == 30
    for one, another in pairs:
        assert [score for score, _ in one] == pytest.approx([score for score, _ in another], abs=1e-3)
        assert [is_greedy for _, is_greedy in one] == [is_greedy for _, is_greedy in another]


@OTHERS
def test_generated_texts_are_equal(sides, other):
    texts, theirs = (sides[name]["samples"]["dsmoe_completion"] for name in ("engine", other))
    # So scores are equal, whatever the metric.
    assert texts == theirs and len({text for [text] in texts}) > 3


@OTHERS
def test_perplexities_agree(sides, other):
    found, theirs = (sides[name]["results"]["dsmoe_perplexity"] for name in ("engine", other))
    for metric in ("word_perplexity,none", "bits_per_byte,none"):
        # A relative error of a perplexity is the absolute one of a mean log probability per word, of some five tokens.
        assert found[metric] == pytest.approx(theirs[metric], rel=1e-4)
    ours, others = (sides[name]["samples"]["dsmoe_perplexity"] for name in ("engine", other))
    for [total], [their_total] in zip(ours, others, strict=True):
        assert total == pytest.approx(their_total, abs=1e-2)
