"""The comparisons of the inference engine."""

import importlib
import inspect

import pytest

from dsmoe_ray.bench.comparisons import measure_all
from dsmoe_ray.bench.infer import choose_comparisons
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.errors import ConfigError


def test_names_are_told_apart_and_every_comparison_can_be_called_as_listed():
    comparisons = choose_comparisons((), Settings())
    assert len({comparison.name for comparison in comparisons}) == len(comparisons)
    for comparison in comparisons:
        function = getattr(importlib.import_module(f"dsmoe_ray.bench.{comparison.module}"), comparison.function)
        inspect.signature(function).bind(Settings(), **dict(comparison.options))


def test_a_beginning_chooses_all_names_that_have_it():
    chosen = choose_comparisons(["llama_cpp_float32"], Settings())
    assert [comparison.name for comparison in chosen] == [f"llama_cpp_float32_b{batch}" for batch in (1, 8, 32)]
    with pytest.raises(ConfigError, match=r"--only lama: there is no such comparison. There are: decode_"):
        choose_comparisons(["lama"], Settings())


def test_a_peer_without_bars_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"--peer ollama: .* There are: transformers, llama_cpp, vllm"):
        choose_comparisons((), Settings(peers={"ollama": ["ollama"]}))


def test_a_peer_that_was_not_given_is_skipped_with_the_way_to_give_it():
    [row] = measure_all(choose_comparisons(["vllm_float32_b1"], Settings()), Settings())
    assert row.status == "skipped" and "--peer vllm=COMMAND" in (row.reason or "")
    assert row.passed is None and row.to_json()["bar"] == {"at_least": 2.0}


def test_a_row_may_have_no_bar():
    [row] = measure_all(choose_comparisons(["vllm_float32_b32"], Settings()), Settings())
    assert row.bar is None and row.to_json()["bar"] is None
