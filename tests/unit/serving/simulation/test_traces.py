"""Traces from files and from seeds, and what is wrong with a bad one."""

import itertools
import json

import numpy as np
import pytest

from dsmoe_ray.errors import ConfigError, DataError
from dsmoe_ray.serving.plan import LogicalExpert
from dsmoe_ray.serving.simulation.traces import open_trace

ROWS = [(100.6, 1, 0, 5), (100.0, 0, 2, 3), (100.1, 0, 2, 4), (101.0, 1, 1, 7)]


def write_jsonl(path, rows):
    names = ("time", "layer", "expert", "tokens")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    return str(path)


def write_npz(path, **changes):
    time, layer, expert, tokens = (np.array(column) for column in zip(*ROWS, strict=True))
    arrays = {"time": time, "layer": layer, "expert": expert, "tokens": tokens} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


@pytest.mark.parametrize("write", [lambda p: write_jsonl(p / "t.jsonl", ROWS), lambda p: write_npz(p / "t.npz")])
def test_a_recording_comes_in_windows_from_its_first_row_and_no_token_is_lost(tmp_path, write):
    trace = open_trace(write(tmp_path))
    assert trace.experts[-1] == LogicalExpert(1, 2)
    assert trace.duration_s == pytest.approx(1.0)
    windows = list(trace.windows(0.5))
    assert [window.tolist() for window in windows] == [[0, 0, 7, 0, 0, 0], [0, 0, 0, 5, 7, 0]]
    assert trace.mean_loads(0.0, 0.5).tolist() == [0, 0, 14, 0, 0, 0]


def test_a_made_up_trace_is_the_same_for_the_same_seed_and_has_the_load_asked_for():
    source = "synthetic:shifting,layers=3,experts=20,tokens_per_s=6000,duration_s=60,period_s=60"
    windows = [np.array(list(open_trace(f"{source},seed={seed}").windows(0.5))) for seed in (1, 1, 2)]
    assert (windows[0] == windows[1]).all()
    assert (windows[0] != windows[2]).any()
    # 360,000 tokens: one standard deviation is 600.
    assert windows[0].sum() == pytest.approx(360_000, abs=3600)
    per_layer = windows[0].reshape(-1, 3, 20).sum(axis=(0, 2))
    assert per_layer == pytest.approx([120_000] * 3, abs=2100)


def test_hot_experts_are_others_after_each_shift():
    trace = open_trace("synthetic:shifting,layers=1,experts=64,swing=0,shift_every_s=10,duration_s=40")
    hot = [set(np.argsort(-trace.mean_loads(start_s, start_s + 10))[:2].tolist()) for start_s in (0, 10, 20, 30)]
    assert all(not a & b for a, b in itertools.pairwise(hot))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty trace"),
        ([(0, 0, 0, -1)], "row 1: tokens must be a whole number"),
        ([(0, 0, 0, 1), (1, 0, 1.5, 1)], "row 2: expert must be a whole number"),
        ([(0, 0, 0, True)], "line 1: tokens must be a number; found True"),
        ([(0, 0, "a", 1)], "line 1: expert must be a number; found 'a'"),
        ([(0, 0, None, 1)], "line 1: expert must be a number; found None"),
        ([(0, 10**6, 10**6, 1)], "more than 1,000,000 experts"),
        ([(0, 0, 0, 1), (1e12, 0, 0, 1)], "Times are in seconds"),
        ([(float("nan"), 0, 0, 1)], "time must be a finite number"),
        ([(0, 0, 0, 10**400)], "tokens is out of range"),
    ],
)
def test_a_bad_recording_is_refused_with_the_row_and_the_reason(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        open_trace(write_jsonl(tmp_path / "t.jsonl", rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: no JSON"),
        ("[1]", "line 1: time must be"),
        ('{"time": 1}', "layer must be a number; it is missing"),
    ],
)
def test_a_line_that_is_no_row_is_refused(tmp_path, text, message):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        open_trace(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert": None}, "array expert is missing"),
        ({"layer": np.zeros((2, 2))}, "layer must be one row"),
        ({"tokens": np.ones(3)}, "tokens has 3 entries and time has 4"),
        ({"tokens": np.array([{}] * 4, dtype=object)}, "no npz file of plain arrays"),
        ({"tokens": np.array(["a"] * 4)}, "tokens must be one row of numbers"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        open_trace(write_npz(tmp_path / "t.npz", **changes))


def test_files_that_are_no_trace_are_refused(tmp_path):
    binary = tmp_path / "t.npz"
    binary.write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(DataError, match="no npz file"):
        open_trace(str(binary))
    (tmp_path / "t.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as text"):
        open_trace(str(tmp_path / "t.bin"))
    with pytest.raises(DataError, match="no such file"):
        open_trace(str(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("synthetic:pareto", DataError, "Choose one of uniform, zipf, shifting"),
        ("synthetic:zipf,alpha", DataError, "Write NAME=VALUE"),
        ("synthetic:zipf,alfa=1", ConfigError, "alpha"),
        ("synthetic:zipf,layers=0", ConfigError, "layers"),
        ("synthetic:zipf,duration_s=inf", ConfigError, "duration_s"),
        ("synthetic:zipf,layers=5000,experts=5000", DataError, "more than 1,000,000 experts"),
    ],
)
def test_a_bad_synthetic_trace_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        open_trace(source)
