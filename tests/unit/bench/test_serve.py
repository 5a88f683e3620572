"""The comparisons of the serving path."""

import importlib
import inspect
from pathlib import Path

import pytest

from dsmoe_ray.bench.bare_echo import start_echo
from dsmoe_ray.bench.comparisons import measure_all
from dsmoe_ray.bench.http_load import start_server
from dsmoe_ray.bench.serve import choose_comparisons
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.bench.worker_side import find_free_port
from dsmoe_ray.errors import BenchError, BenchUnavailableError, ConfigError


def test_names_are_told_apart_and_every_comparison_can_be_called_as_listed():
    comparisons = choose_comparisons((), Settings())
    assert len({comparison.name for comparison in comparisons}) == len(comparisons)
    for comparison in comparisons:
        function = getattr(importlib.import_module(f"dsmoe_ray.bench.{comparison.module}"), comparison.function)
        inspect.signature(function).bind(Settings(), **dict(comparison.options))


def test_other_peers_and_devices_are_refused():
    with pytest.raises(ConfigError, match=r"--peer vllm: .* There are: vllm_server"):
        choose_comparisons((), Settings(peers={"vllm": ["vllm"]}))
    with pytest.raises(ConfigError, match="CPU only"):
        choose_comparisons((), Settings(device="cuda"))


def test_a_server_that_was_not_given_is_skipped_with_the_way_to_give_it():
    [row] = measure_all(choose_comparisons(["http_vllm"], Settings()), Settings())
    assert row.status == "skipped" and "--peer vllm_server=COMMAND" in (row.reason or "")


def test_a_server_that_ends_or_is_not_there_is_told():
    with pytest.raises(BenchError, match="the server ended with code 3: no luck"):
        with start_server(["sh", "-c", "echo no luck; exit 3"], name="the server"):
            pass
    with pytest.raises(BenchUnavailableError, match="the server cannot be started"):
        with start_server(["/nowhere/at/all"], name="the server"):
            pass


@pytest.mark.parametrize("transport", ["unix", "grpc"])
def test_a_bare_echo_answers_again_and_again(transport: str, tmp_path: Path):
    address = str(tmp_path / "echo") if transport == "unix" else f"127.0.0.1:{find_free_port()}"
    with start_echo(transport, address, request_bytes=1000, reply_bytes=3000) as round_trip:
        for _ in range(3):
            round_trip()
