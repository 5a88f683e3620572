"""An evaluation as a table for people and as plain values for programs. Measures nothing."""

import math
from typing import Any

from rich.table import Table
from rich.text import Text

from dsmoe_ray.evaluation.quality import QualityReport, RoutingQuality


def to_json(report: QualityReport) -> dict[str, Any]:
    """Return plain values for JSON; None where a number is not finite."""
    parameters = report.parameters
    return {
        "num_tokens": report.num_tokens,
        "seq_len": report.seq_len,
        "batch_sequences": report.batch_sequences,
        "parameters": parameters.total,
        "non_embedding_parameters": parameters.non_embedding,
        "ffn_parameters": parameters.ffn,
        "settings": [_setting_to_json(setting, report) for setting in report.settings],
    }


def to_table(report: QualityReport) -> Table:
    """Return one row per setting; shares are of the parts' own totals, embeddings counted in the total."""
    windows = f"{report.num_tokens:,} tokens in windows of {report.seq_len}, {report.batch_sequences} at a time"
    table = Table(title=windows, title_justify="left", box=None, pad_edge=False)
    headers = ("perplexity", "vs all", "FFN experts", "distinct", "active FFN", "", "active total", "", "tokens/s")
    table.add_column("routing")
    for header in headers:
        table.add_column(header, justify="right")
    for setting in report.settings:
        table.add_row(Text(setting.routing), *_cells(setting, report))
    return table


def _setting_to_json(setting: RoutingQuality, report: QualityReport) -> dict[str, Any]:
    active, parameters = setting.active, report.parameters
    dense = _find_dense(report)
    return {
        "routing": setting.routing,
        "loss": _finite(setting.loss),
        "perplexity": _finite(setting.perplexity),
        "perplexity_over_dense_ratio": None if dense is None else _finite(setting.perplexity / dense.perplexity),
        "mean_kept_ffn_experts": _mean(setting.kept_ffn_experts),
        "mean_kept_attention_experts": _mean(setting.kept_attention_experts),
        "mean_distinct_ffn_experts": _mean(setting.distinct_ffn_experts),
        "active_ffn_parameters": active.ffn,
        "active_ffn_ratio": active.ffn / parameters.ffn,
        "active_parameters": active.total,
        "active_ratio": active.total / parameters.total,
        "active_non_embedding_parameters": active.non_embedding,
        "active_non_embedding_ratio": active.non_embedding / parameters.non_embedding,
        "tokens_per_s": setting.tokens_per_s,
        "kept_ffn_experts_by_layer": setting.kept_ffn_experts,
        "kept_attention_experts_by_layer": setting.kept_attention_experts,
        "distinct_ffn_experts_by_layer": setting.distinct_ffn_experts,
    }


def _cells(setting: RoutingQuality, report: QualityReport) -> list[str]:
    active, parameters = setting.active, report.parameters
    dense = _find_dense(report)
    return [
        f"{setting.perplexity:.3f}",
        "" if dense is None else f"{setting.perplexity / dense.perplexity - 1:+.2%}",
        _to_cell(_mean(setting.kept_ffn_experts)),
        _to_cell(_mean(setting.distinct_ffn_experts)),
        format_count(active.ffn),
        f"{active.ffn / parameters.ffn:.0%}",
        format_count(active.total),
        f"{active.total / parameters.total:.0%}",
        f"{setting.tokens_per_s:,.0f}",
    ]


def format_count(value: int) -> str:
    """Return a number of parameters with three digits, ``2.13M``."""
    for scale, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return str(value)


def _find_dense(report: QualityReport) -> RoutingQuality | None:
    return next((setting for setting in report.settings if setting.routing == "dense"), None)


def _to_cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
