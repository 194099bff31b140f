"""What both benches measure, and how they compare it."""

import statistics
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed batch."""

    seconds: float
    step_seconds: float  # median over steps of decoding alone; 0 where steps are not seen


def ratio(above: list[float], below: list[float]) -> float:
    """Compare two kinds repetition by repetition; the median."""
    return round(statistics.median(x / y for x, y in zip(above, below, strict=True)), 3)
