"""An evaluation as a table and as JSON."""

import io
import json
import math

import pytest
from rich.console import Console

from dsmoe_ray.evaluation.quality import QualityReport, RoutingQuality
from dsmoe_ray.evaluation.report import format_count, to_json, to_table
from dsmoe_ray.model.accounting import KeptExperts, count_parameters
from tests.fakes.tiny_artifact import make_config


def make_setting(routing, loss, *, kept=4.0, dense_ffn=False) -> RoutingQuality:
    return RoutingQuality(
        routing=routing,
        loss=loss,
        tokens_per_s=12345.6,
        kept_attention_experts=[2.0, 2.0],
        kept_ffn_experts=[] if dense_ffn else [kept - 0.5, kept + 0.5],
        distinct_ffn_experts=[] if dense_ffn else [3.5, 4.0],
        active=count_parameters(make_config(), kept=KeptExperts(ffn=kept)),
    )


def make_report(*settings) -> QualityReport:
    return QualityReport(
        num_tokens=2048,
        seq_len=16,
        batch_sequences=4,
        parameters=count_parameters(make_config()),
        settings=list(settings),
    )


def print_table(report) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=140).print(to_table(report))
    return stream.getvalue().splitlines()


def test_rows_show_the_difference_to_all_experts_and_the_share_in_use():
    title, header, dense, sparse = print_table(
        make_report(make_setting("dense", math.log(10)), make_setting("top_k=1", math.log(10.2), kept=1.0))
    )
    assert title.strip() == "2,048 tokens in windows of 16, 4 at a time"
    assert header.split()[:2] == ["routing", "perplexity"]
    assert dense.split()[:5] == ["dense", "10.000", "+0.00%", "4.0", "3.8"]
    assert sparse.split()[:3] == ["top_k=1", "10.200", "+2.00%"]
    assert "25%" in sparse and sparse.split()[-1] == "12,346"


def test_without_a_dense_setting_there_is_no_difference_to_show():
    report = make_report(make_setting("top_k=1", 2.0, kept=1.0))
    assert print_table(report)[2].split()[:3] == ["top_k=1", "7.389", "1.0"]
    assert to_json(report)["settings"][0]["perplexity_over_dense_ratio"] is None


def test_a_model_without_a_mixture_has_empty_cells():
    values = to_json(make_report(make_setting("dense", 2.0, dense_ffn=True)))["settings"][0]
    assert values["mean_kept_ffn_experts"] is None and values["kept_ffn_experts_by_layer"] == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1000.0])
def test_a_broken_model_gives_null_and_not_invalid_json(loss):
    values = to_json(make_report(make_setting("dense", loss)))
    json.dumps(values, allow_nan=False)
    assert values["settings"][0]["perplexity"] is None
    print_table(make_report(make_setting("dense", loss)))


def test_json_counts_add_up():
    values = to_json(make_report(make_setting("top_k=2", 2.0, kept=2.0)))
    setting = values["settings"][0]
    assert setting["active_ffn_ratio"] == 0.5
    assert setting["active_parameters"] == values["parameters"] - values["ffn_parameters"] // 2
    assert setting["active_ratio"] == setting["active_parameters"] / values["parameters"]
    assert setting["mean_kept_ffn_experts"] == 2.0


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (1500, "1.5k"), (2_130_000, "2.13M"), (6_338_000_000, "6.34B")]
)
def test_counts_are_short(count, text):
    assert format_count(count) == text
