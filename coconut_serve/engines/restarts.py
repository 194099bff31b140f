"""Limits how often a failed engine restarts."""

import time
from dataclasses import dataclass, field

_MAX_RESTARTS = 3


@dataclass(slots=True)
class RestartBudget:
    """Allows three restarts within a window; after one more failure the engine stays dead."""

    window_seconds: float
    _failures: list[float] = field(default_factory=list)  # times

    def allows_another(self) -> bool:
        """Record a failure; return whether the engine may restart after it."""
        now = time.monotonic()
        self._failures = [t for t in self._failures if now - t < self.window_seconds] + [now]
        return len(self._failures) <= _MAX_RESTARTS
