"""Traces: how many tokens wanted each expert, window by window; recorded in a file or made up from a seed.

A recording has four columns: ``time`` in seconds, ``layer``, ``expert`` and ``tokens``; as JSONL (one object a line)
or as an npz file of four arrays. Rows may come in any order, and several may tell of the same expert and time.

Shape letters: N rows, E logical experts of the model.
"""

import itertools
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dsmoe_ray.config_io import parse_config
from dsmoe_ray.errors import DataError
from dsmoe_ray.serving.demand import index_experts
from dsmoe_ray.serving.plan import LogicalExpert
from dsmoe_ray.serving.simulation.config import SyntheticConfig

COLUMNS = ("time", "layer", "expert", "tokens")
KINDS = ("uniform", "zipf", "shifting")
MAX_EXPERTS = 1_000_000
MAX_DURATION_S = 7 * 24 * 3600.0
_SCHEME = "synthetic:"


class Trace(Protocol):
    """Traffic of one model."""

    @property
    def experts(self) -> tuple[LogicalExpert, ...]:
        """Return all experts of the model."""

    @property
    def duration_s(self) -> float:
        """Return how long it lasts."""

    def windows(self, interval_s: float) -> Iterator[np.ndarray]:
        """Return the tokens that want each expert ``(E,)`` in one interval after another."""

    def mean_loads(self, start_s: float, end_s: float) -> np.ndarray:
        """Return the tokens per second that want each expert ``(E,)`` between two times."""


def open_trace(source: str) -> Trace:
    """Return the trace of a file's path, or of ``synthetic:KIND[,OPTION=VALUE...]``.

    Raises:
        DataError: there is no such file, or its content is no trace; says what is wrong and where.
        ConfigError: an option of a synthetic trace is unknown or impossible.
    """
    if source.startswith(_SCHEME):
        return _parse_synthetic(source)
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"{source}: no such file. Give a recorded trace (.jsonl or .npz) or {_SCHEME}KIND with KIND one of "
            f"{', '.join(KINDS)}."
        )
    columns = _read_npz(path) if path.suffix == ".npz" else _read_jsonl(path)
    return _recorded(columns, source)


@dataclass(frozen=True, kw_only=True)
class RecordedTrace:
    """Rows in order of time, which begins at 0."""

    experts: tuple[LogicalExpert, ...]
    duration_s: float
    times_s: np.ndarray
    positions: np.ndarray
    """Of each row's expert in ``experts``."""
    tokens: np.ndarray

    def windows(self, interval_s: float) -> Iterator[np.ndarray]:
        """Return the tokens of each interval; the last one is as long as the others."""
        num_windows = max(1, math.ceil(self.duration_s / interval_s))
        edges = np.searchsorted(self.times_s, np.arange(1, num_windows + 1) * interval_s)
        # The end belongs to the last window.
        edges[-1] = len(self.times_s)
        start = 0
        for end in edges.tolist():
            yield self._sum(start, end)
            start = end

    def mean_loads(self, start_s: float, end_s: float) -> np.ndarray:
        """Return tokens per second between two times."""
        start, end = np.searchsorted(self.times_s, (start_s, end_s)).tolist()
        return self._sum(start, end) / (end_s - start_s)

    def _sum(self, start: int, end: int) -> np.ndarray:
        return np.bincount(self.positions[start:end], weights=self.tokens[start:end], minlength=len(self.experts))


class SyntheticTrace:
    """Traffic from a seed; the same at any time it is asked for."""

    def __init__(self, kind: str, config: SyntheticConfig) -> None:
        self.kind, self.config = kind, config
        self.experts: tuple[LogicalExpert, ...] = index_experts(config.layers, config.experts)
        self.duration_s: float = config.duration_s
        rng = np.random.default_rng(config.seed)
        shape = (config.layers, config.experts)
        if kind == "zipf":
            weights = np.tile(np.arange(1, config.experts + 1, dtype=np.float64) ** -config.alpha, (config.layers, 1))
            self._weights = rng.permuted(weights, axis=1)
        elif kind == "shifting":
            self._weights = rng.lognormal(sigma=0.5, size=shape)
        else:
            self._weights = np.ones(shape)
        self._order = rng.permuted(np.tile(np.arange(config.experts), (config.layers, 1)), axis=1)

    def windows(self, interval_s: float) -> Iterator[np.ndarray]:
        """Return the tokens of each interval, drawn at the rates of its middle."""
        rng = np.random.default_rng((self.config.seed, 1))
        for window in range(max(1, math.ceil(self.duration_s / interval_s))):
            yield rng.poisson(self.loads_at((window + 0.5) * interval_s) * interval_s).astype(np.float64)

    def mean_loads(self, start_s: float, end_s: float) -> np.ndarray:
        """Return the rates between two times, without chance."""
        times_s = np.linspace(start_s, end_s, 33)
        return np.mean([self.loads_at((a + b) / 2) for a, b in itertools.pairwise(times_s)], axis=0)

    def loads_at(self, time_s: float) -> np.ndarray:
        """Return the tokens per second that want each expert."""
        config, weights = self.config, self._weights
        if self.kind == "shifting":
            num_hot = max(1, round(config.hot_ratio * config.experts))
            turn = int(time_s / config.shift_every_s)
            hot = self._order[:, np.arange(turn * num_hot, (turn + 1) * num_hot) % config.experts]
            weights = weights.copy()
            np.put_along_axis(weights, hot, np.take_along_axis(weights, hot, axis=1) * config.hot_factor, axis=1)
        total = config.tokens_per_s * (1 + config.swing * math.sin(2 * math.pi * time_s / config.period_s))
        return (total / config.layers * weights / weights.sum(axis=1, keepdims=True)).ravel()


def _parse_synthetic(source: str) -> SyntheticTrace:
    kind, *options = source.removeprefix(_SCHEME).split(",")
    if kind not in KINDS:
        raise DataError(f"{source}: there is no synthetic trace {kind!r}. Choose one of {', '.join(KINDS)}.")
    values = {}
    for option in options:
        name, sign, value = option.partition("=")
        if not sign:
            raise DataError(f"{source}: {option!r} is no option. Write NAME=VALUE, such as {_SCHEME}{kind},seed=1.")
        values[name.strip()] = value.strip()
    config = parse_config(values, SyntheticConfig, source=source)
    _check_size(config.layers, config.experts, config.duration_s, source)
    return SyntheticTrace(kind, config)


def _read_jsonl(path: Path) -> dict[str, np.ndarray]:
    rows: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    _add_row(rows, line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}. Give JSONL, or npz with the ending .npz.") from error
    return {name: np.array(values, dtype=np.float64) for name, values in rows.items()}


def _add_row(rows: dict[str, list[Any]], line: str, where: str) -> None:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: no JSON: {error}. Write one object a line with {', '.join(COLUMNS)}.") from error
    for name in COLUMNS:
        value = row.get(name) if isinstance(row, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = f"found {value!r}" if isinstance(row, dict) and name in row else "it is missing"
            raise DataError(f"{where}: {name} must be a number; {found}. A row needs {', '.join(COLUMNS)}.")
        if abs(value) > 2**53:
            raise DataError(f"{where}: {name} is out of range: {value}.")
        rows[name].append(value)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in COLUMNS if name not in arrays.files]
            if missing:
                raise DataError(f"{path}: array {missing[0]} is missing. It needs {', '.join(COLUMNS)}.")
            columns = {name: np.asarray(arrays[name]) for name in COLUMNS}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no npz file of plain arrays: {error}.") from error
    for name, column in columns.items():
        if column.ndim != 1 or column.dtype.kind not in "iuf":
            raise DataError(f"{path}: {name} must be one row of numbers; found {column.dtype} of shape {column.shape}.")
        if len(column) != len(columns["time"]):
            raise DataError(f"{path}: {name} has {len(column)} entries and time has {len(columns['time'])}.")
    return {name: column.astype(np.float64) for name, column in columns.items()}


def _recorded(columns: dict[str, np.ndarray], source: str) -> RecordedTrace:
    times_s, tokens = columns["time"], columns["tokens"]
    if not len(times_s):
        raise DataError(f"{source}: an empty trace. It needs rows with {', '.join(COLUMNS)}.")
    for name, column in columns.items():
        _check_column(name, column, source)
    num_layers, num_experts = int(columns["layer"].max()) + 1, int(columns["expert"].max()) + 1
    duration_s = float(times_s.max() - times_s.min())
    _check_size(num_layers, num_experts, duration_s, source)
    order = np.argsort(times_s, kind="stable")
    positions = (columns["layer"] * num_experts + columns["expert"]).astype(np.int64)
    return RecordedTrace(
        experts=index_experts(num_layers, num_experts),
        duration_s=duration_s,
        times_s=times_s[order] - times_s.min(),
        positions=positions[order],
        tokens=tokens[order],
    )


def _check_column(name: str, column: np.ndarray, source: str) -> None:
    if name == "time":
        is_wrong, rule = ~np.isfinite(column), "a finite number of seconds"
    else:
        is_wrong, rule = ~(np.isfinite(column) & (column >= 0) & (column == np.floor(column))), "a whole number from 0"
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        raise DataError(f"{source}, row {row + 1}: {name} must be {rule}; found {column[row]}.")


def _check_size(num_layers: int, num_experts: int, duration_s: float, source: str) -> None:
    if num_layers * num_experts > MAX_EXPERTS:
        raise DataError(
            f"{source}: {num_layers} layers of {num_experts} experts are more than {MAX_EXPERTS:,} experts. Layers and "
            "experts are counted from 0."
        )
    if duration_s > MAX_DURATION_S:
        raise DataError(
            f"{source}: it lasts {duration_s:.0f} s, more than the {MAX_DURATION_S:.0f} allowed. Times are in seconds."
        )
