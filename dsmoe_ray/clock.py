"""The only door to time, so that tests can stand in for it."""

import time


def monotonic_s() -> float:
    """Return seconds from an arbitrary start; only differences mean anything."""
    return time.perf_counter()


def cpu_s() -> float:
    """Return seconds that processors have worked for this process; other programs do not lengthen them."""
    return time.process_time()


def unix_s() -> float:
    """Return seconds since 1970-01-01 UTC."""
    return time.time()


def sleep_s(duration_s: float) -> None:
    """Block this thread for ``duration_s`` seconds."""
    time.sleep(duration_s)
