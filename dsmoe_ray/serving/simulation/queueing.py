"""How long expert calls take on hosts that are so busy: the model of time that every system is measured by.

A host computes ``tokens_per_host_s`` tokens a second, calls in order of arrival. Within a window of arrivals a, with
utilization u = a / (tokens_per_host_s * window):

    latency = network + backlog / speed + call * (1 + u / (2 (1 - u))),  call = tokens_per_call / speed

The last term is the mean time in an M/D/1 queue, u at most 0.95 in it; what a host cannot compute within the window is
its backlog in the next one (the mean of both ends counts). A token for an expert that is not in memory waits for it to
be loaded. All tokens of a window and host have that one latency; percentiles are over tokens.
"""

from dataclasses import dataclass

import numpy as np

from dsmoe_ray.serving.simulation.config import SimulationConfig

_MAX_RANDOM_UTILIZATION = 0.95
# Bins of one per cent between 10 microseconds and three hours.
_LOWEST_S, _RATIO, _NUM_BINS = 1e-5, 1.01, 2100


class LatencyHistogram:
    """Latencies by number of tokens, to one per cent."""

    def __init__(self) -> None:
        self._tokens = np.zeros(_NUM_BINS)
        self._sum_s = 0.0

    def add(self, latencies_s: np.ndarray, tokens: np.ndarray) -> None:
        """Count so many tokens with such latencies."""
        bins = np.log(np.maximum(latencies_s, _LOWEST_S) / _LOWEST_S) / np.log(_RATIO)
        bins = np.minimum(bins.astype(np.int64), _NUM_BINS - 1)
        self._tokens += np.bincount(bins, weights=tokens, minlength=_NUM_BINS)
        self._sum_s += float((latencies_s * tokens).sum())

    @property
    def num_tokens(self) -> float:
        """Return how many tokens were counted."""
        return float(self._tokens.sum())

    def mean_s(self) -> float:
        """Return the mean latency; 0 without tokens."""
        return self._sum_s / self.num_tokens if self.num_tokens else 0.0

    def quantile_s(self, share: float) -> float:
        """Return the latency that a share of the tokens does not exceed, to one per cent; 0 without tokens."""
        if not self.num_tokens:
            return 0.0
        number = int(np.searchsorted(np.cumsum(self._tokens), share * self.num_tokens))
        return float(_LOWEST_S * _RATIO ** (min(number, _NUM_BINS - 1) + 0.5))


@dataclass(frozen=True, kw_only=True)
class ServedWindow:
    """What hosts made of the tokens of one window."""

    latencies_s: np.ndarray
    """Of each host's tokens."""
    backlogs: np.ndarray
    """Tokens left for the next window."""
    busy_s: np.ndarray
    utilizations: np.ndarray
    """Arrivals over what a host can compute; above 1 where work piles up."""


def serve_window(arrivals: np.ndarray, backlogs: np.ndarray, window_s: float, config: SimulationConfig) -> ServedWindow:
    """Return what becomes of the tokens that arrive at each host in a window."""
    speed = config.tokens_per_host_s
    work = backlogs + arrivals
    left = np.maximum(work - speed * window_s, 0.0)
    utilizations = arrivals / (speed * window_s)
    random = np.minimum(utilizations, _MAX_RANDOM_UTILIZATION)
    call_s = config.tokens_per_call / speed
    return ServedWindow(
        latencies_s=config.network_s + (backlogs + left) / 2 / speed + call_s * (1 + random / (2 * (1 - random))),
        backlogs=left,
        busy_s=(work - left) / speed,
        utilizations=utilizations,
    )
