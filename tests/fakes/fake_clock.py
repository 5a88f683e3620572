"""A clock that stands still until a test moves it."""

from dataclasses import dataclass


@dataclass
class FakeClock:
    """Stands in for ``clock.monotonic_s`` where a class takes its clock as an argument."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s

    def advance(self, duration_s: float) -> float:
        """Let time pass; return the new time."""
        self.now_s += duration_s
        return self.now_s
