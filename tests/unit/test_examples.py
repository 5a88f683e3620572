"""The ready-made configs load, and those of the paper have its figures."""

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from dsmoe_ray.config_io import load_config
from dsmoe_ray.model.accounting import count_parameters
from dsmoe_ray.serving.app import read_args
from dsmoe_ray.training.config import TrainingRunConfig
from dsmoe_ray.training.validation import build_report

EXAMPLES = Path(__file__).parents[2] / "examples"

# name, total and dense twin's parameters without embeddings (millions), trained tokens (billions), tokens of a step
# (2^20), alphas of attention and FFN, k
PAPER = [
    ("ds_moe_1b", (1067, 1067), 1017, 30, 0.5, 3.5e-4, 6.3e-4, 8),
    ("ds_moe_3b", (2793, 2846), 2705, 100, 2, 2e-4, 4e-4, 6),
    ("ds_moe_6b", (6338, 6343), 6186, 100, 2, 2e-4, 2e-4, 4),
]


SERVING = EXAMPLES / "serve.yaml"


@pytest.mark.parametrize("path", sorted(set(EXAMPLES.glob("*.yaml")) - {SERVING}), ids=lambda path: path.stem)
def test_an_example_passes_its_checks(path):
    report = build_report(load_config(path, TrainingRunConfig))
    assert not report.failed
    assert report.active is not None


@pytest.mark.parametrize(
    ("name", "total", "twin", "trained", "step", "alpha_attention", "alpha_ffn", "top_k"),
    PAPER,
    ids=lambda value: value,
)
def test_the_papers_models_have_the_papers_figures(name, total, twin, trained, step, alpha_attention, alpha_ffn, top_k):
    config = load_config(EXAMPLES / f"{name}.yaml", TrainingRunConfig)
    model, train = config.model, config.train
    assert total[0] * 0.995 <= count_parameters(model).non_embedding / 1e6 <= total[1] * 1.005
    assert count_parameters(model.dense_twin()).non_embedding / 1e6 == pytest.approx(twin, rel=0.005)
    assert train.num_tokens_per_step == step * 2**20
    # Steps are whole, so the token budget is met to within one step.
    assert abs(train.steps * train.num_tokens_per_step - trained * 1e9) < train.num_tokens_per_step
    assert train.loss.mutual_information_attention == alpha_attention
    assert train.loss.mutual_information_ffn == alpha_ffn
    assert model.ffn.router.inference.top_k == top_k
    assert (train.lr, train.weight_decay, train.clip_norm, train.seq_len) == (3e-4, 0.01, 1.0, 2048)


def test_the_application_for_ray_serve_passes_its_checks():
    schema = ServeDeploySchema.model_validate(yaml.safe_load(SERVING.read_text()))
    [application] = schema.applications
    assert application.import_path == "dsmoe_ray.serving.app:build_app"
    assert read_args(application.args).hosts.count == 2
