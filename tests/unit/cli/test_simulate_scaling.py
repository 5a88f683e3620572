"""The command: a report as JSON or as a table, and a person's mistakes."""

import json

import pytest

from dsmoe_ray.cli.main import main

TRACE = "synthetic:zipf,layers=2,experts=8,tokens_per_s=2000,duration_s=12"
CLUSTER = ["--set", "hosts=8", "--set", "warm_up_s=2"]


def run(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["simulate-scaling", *arguments])
    return ended.value.code, capsys.readouterr()


def test_json_is_one_object_and_events_say_what_changed(tmp_path, capsys):
    events = tmp_path / "events.txt"
    code, printed = run([TRACE, *CLUSTER, "--json", "--events", str(events)], capsys)
    assert code == 0
    report = json.loads(printed.out)
    assert report["simulated_s"] == 12
    assert report["num_experts"] == 16
    lines = events.read_text().splitlines()
    assert len(lines) == report["decisions"]["num_events"]
    assert all(" s  expert " in line and "tokens_per_s" in line for line in lines)


def test_a_table_has_a_row_for_each_system(capsys):
    code, printed = run([TRACE, *CLUSTER], capsys)
    assert code == 0
    for name in ("dsmoe", "whole-model replicas", "fixed one-replica experts", "beside EPLB"):
        assert name in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.jsonl"], "no such file"),
        (["synthetic:zipf,alpha=x"], "alpha"),
        ([TRACE, "--set", "host=3"], "hosts"),
        ([TRACE, *CLUSTER, "--events", "/nowhere/x"], "cannot be written"),
    ],
)
def test_a_mistake_gets_a_message_and_exit_code_2(arguments, message, capsys):
    code, printed = run(arguments, capsys)
    assert code == 2
    assert message in printed.err
    assert printed.out == ""
