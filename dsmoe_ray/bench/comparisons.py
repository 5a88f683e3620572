"""The comparisons of a bench as data, and one row of results for each."""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsmoe_ray.bench.measure import Bar, Measurement, Row
from dsmoe_ray.bench.settings import Settings
from dsmoe_ray.clock import monotonic_s
from dsmoe_ray.errors import BenchError, BenchUnavailableError, ConfigError, ExchangeError


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row to be measured. Its module is imported only then, as it may need a package that is not there."""

    name: str
    what: str
    unit: str = "ratio of tokens/s"
    bar: Bar | None
    """None where a figure is told and held against nothing."""
    module: str
    function: str
    options: tuple[tuple[str, str], ...] = ()


def choose_by_name(names: Sequence[str], offered: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with these names, or whose names begin so.

    Raises:
        ConfigError: a name fits none.
    """
    for name in names:
        if not any(comparison.name.startswith(name) for comparison in offered):
            known = ", ".join(comparison.name for comparison in offered)
            raise ConfigError(f"--only {name}: there is no such comparison. There are: {known}.")
    return [comparison for comparison in offered if comparison.name.startswith(tuple(names))]


def choose_on_cpu(
    subject: str, names: Sequence[str], settings: Settings, *, offered: Iterable[Comparison], peers: Iterable[str]
) -> list[Comparison]:
    """Return what was asked for of a bench that runs on a CPU only; by default everything.

    Raises:
        ConfigError: a name fits none, a peer is unknown, or the device is no CPU.
    """
    if settings.device != "cpu":
        raise ConfigError(f"--device {settings.device}: {subject} is measured on a CPU only. Leave --device out.")
    known = list(peers)
    if unknown := sorted(set(settings.peers) - set(known)):
        raise ConfigError(f"--peer {unknown[0]}: there is no such peer. There are: {', '.join(known)}.")
    comparisons = list(offered)
    return choose_by_name(names, comparisons) if names else comparisons


def measure_all(comparisons: Sequence[Comparison], settings: Settings) -> Iterator[Row]:
    """Measure one comparison after another; one that fails or cannot be made is a row that says so."""
    for comparison in comparisons:
        load_average = os.getloadavg()[0]
        start_s = monotonic_s()
        status, reason, measurement = _measure(comparison, settings)
        yield Row(
            name=comparison.name,
            what=comparison.what,
            unit=comparison.unit,
            bar=comparison.bar,
            status=status,
            reason=reason,
            measurement=measurement,
            duration_s=monotonic_s() - start_s,
            load_average=load_average,
        )


def _measure(comparison: Comparison, settings: Settings) -> tuple[Any, str | None, Measurement | None]:
    try:
        module = importlib.import_module(f"dsmoe_ray.bench.{comparison.module}")
    except ModuleNotFoundError as error:
        return "skipped", f"the package {error.name} is not installed", None
    compare: Callable[..., Measurement] = getattr(module, comparison.function)
    try:
        return "measured", None, compare(settings, **dict(comparison.options))
    except BenchUnavailableError as error:
        return "skipped", str(error), None
    except (BenchError, ExchangeError, RuntimeError) as error:
        # RuntimeError is how torch tells that memory ran out; the other comparisons may still fit.
        return "failed", str(error), None
