"""The report of a run, and each check that can warn or fail."""

import json

import pytest

from dsmoe_ray.training.run_checks import find_obstacles, run_checks
from dsmoe_ray.training.validation import build_report


def find(config, name):
    return next(check for check in run_checks(config) if check.name == name)


def write_tokenizer(tmp_path, *, size, added=()):
    path = tmp_path / "tokenizer.json"
    content = {
        "model": {"type": "BPE", "vocab": {f"t{number}": number for number in range(size)}},
        "added_tokens": [{"id": number, "content": f"<{number}>"} for number in added],
    }
    path.write_text(json.dumps(content))
    return path


def test_a_clean_run_passes_every_check(tiny_config, text_dir):
    assert {check.status for check in build_report(tiny_config()).checks} == {"passed"}


def test_missing_data_is_a_warning_that_names_the_path(tiny_config):
    check = find(tiny_config("data.paths=['{stdlib}', s3://bucket/x, /no/such/place]"), "data")
    assert check.status == "warning"
    assert "/no/such/place" in check.detail and "s3://bucket" in check.detail and "stdlib" not in check.detail


def test_paths_are_looked_for_where_training_reads_them(tiny_config, text_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(text_dir.parent))
    assert find(tiny_config("data.paths=['{stdlib}/json', ~/text]"), "data").status == "passed"


def test_a_run_cannot_start_where_its_data_is_missing(tiny_config, text_dir):
    assert find_obstacles(tiny_config()) == []
    [obstacle] = find_obstacles(tiny_config("data.paths=[/no/such/place]"))
    assert "/no/such/place" in obstacle


@pytest.mark.parametrize(
    ("size", "added", "status", "detail"),
    [
        pytest.param(300, (), "passed", "300 tokens in a vocabulary of 300", id="fits"),
        pytest.param(301, (), "failed", "raise model.vocab_size from 300 to 301", id="too many"),
        pytest.param(290, (311,), "failed", "raise model.vocab_size from 300 to 312", id="added token beyond"),
    ],
)
def test_token_ids_must_fit_the_vocabulary(tiny_config, tmp_path, size, added, status, detail):
    path = write_tokenizer(tmp_path, size=size, added=added)
    check = find(tiny_config(f"data.tokenizer={path}"), "tokenizer")
    assert check.status == status
    assert detail in check.detail


def test_a_tokenizer_that_is_not_there_is_a_warning_and_one_that_is_none_a_failure(tiny_config, tmp_path):
    assert find(tiny_config("data.tokenizer=/no/tokenizer.json"), "tokenizer").status == "warning"
    (tmp_path / "notes.txt").write_text("{}")
    check = find(tiny_config(f"data.tokenizer={tmp_path / 'notes.txt'}"), "tokenizer")
    assert check.status == "failed"
    assert "cannot be read as a tokenizer.json" in check.detail


@pytest.mark.parametrize(
    ("override", "name", "status"),
    [
        pytest.param("model.vocab_size=256", "tokenizer", "failed", id="no room for bytes"),
        pytest.param("parallel.exchange_chunks=200", "exchange", "failed", id="more chunks than tokens"),
        pytest.param("train.lr_schedule.warmup_steps=9", "schedule", "warning", id="warm-up longer than the run"),
        pytest.param(
            "train.routing_ffn={mode: anneal, top_k: 2, end_step: 9}", "routing", "warning", id="anneal beyond the end"
        ),
        pytest.param("model.init_from=/no/artifact", "init_from", "warning", id="nothing to start from"),
    ],
)
def test_a_check_tells_what_is_wrong(tiny_config, text_dir, override, name, status):
    config = tiny_config(override)
    assert find(config, name).status == status
    assert bool(build_report(config).failed) == (status == "failed")


def test_active_parameters_follow_the_deployed_routing(tiny_config):
    report = build_report(tiny_config("model.ffn.router.inference={mode: top_k, top_k: 1}"))
    assert report.active.ffn == report.parameters.ffn / 4
    assert report.active.attention == report.parameters.attention
    assert report.flops_per_token.forward_deployed < report.flops_per_token.forward
    assert report.deployed_routing == "attention dense of 2, ffn top_k=1 of 4"


def test_what_a_threshold_keeps_is_not_guessed(tiny_config):
    report = build_report(tiny_config("model.ffn.router.inference={mode: threshold, threshold: 0.48}"))
    assert (report.active, report.decode_bytes, report.flops_per_token.forward_deployed) == (None, None, None)
    assert json.loads(json.dumps(report.to_json()))["active"] is None


def test_sparse_training_costs_fewer_flops_and_changing_k_counts_as_dense(tiny_config):
    dense = build_report(tiny_config()).flops_per_token.training
    sparse = build_report(tiny_config("train.routing_ffn={mode: top_k, top_k: 1}")).flops_per_token.training
    random = build_report(tiny_config("train.routing_ffn={mode: random_k, top_k: 1}")).flops_per_token.training
    assert sparse < dense == random


def test_accumulation_shows_in_micro_steps_and_memory_but_not_in_traffic(tiny_config):
    whole = build_report(tiny_config("parallel.ep=2"))
    parts = build_report(tiny_config("parallel.ep=2", "train.num_tokens_per_micro_step=16"))
    assert (whole.num_micro_steps, parts.num_micro_steps) == (1, 4)
    assert parts.memory.activations_bytes < whole.memory.activations_bytes
    assert parts.traffic == whole.traffic
