"""Histogram buckets, and the parser of --custom-histogram-buckets, which replaces them."""

import itertools
import json
import math
from typing import Any

from coconut_serve.errors import StartupError

# Upper bounds by family; families that vLLM also has keep vLLM's names.
BUCKETS: dict[str, tuple[float, ...]] = {
    # From arrival or prefill to a first event: vLLM's buckets.
    "time_to_first_token": (
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
        40, 80, 160, 640, 2560,
    ),
    # Between tokens: vLLM's, with a finer low end because small models beat 10 ms.
    "inter_token_latency": (
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1,
        2.5, 5, 7.5, 10, 20, 40, 80,
    ),
    "request_latency": (
        0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240,
        480, 960, 1920, 7680,
    ),
    "step_latency": (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
    "request_tokens": (
        1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000,
    ),
    "request_num_preemptions": (0, 1, 2, 3, 4, 5, 10, 20),
    "batch_sequences": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "latent_steps": (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128),
}  # fmt: skip


def parse_buckets(text: str) -> dict[str, tuple[float, ...]]:
    """Parse histogram bounds by family from JSON: {"latent_steps": [1, 10, 100]}.

    Raises:
        StartupError: It is not such a mapping, or names a family that is not in BUCKETS.
    """
    flag = "--custom-histogram-buckets"
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise StartupError(f"{flag} takes a JSON object, not {text!r}", param=flag)
    for family, bounds in given.items():
        if family not in BUCKETS:
            families = ", ".join(BUCKETS)
            raise StartupError(f"{flag}: {family!r} is not one of {families}", param=flag)
        if not (isinstance(bounds, list) and _are_bounds(bounds)):
            raise StartupError(f"{flag}: {family}: give rising numbers from 0 on", param=flag)
    return {family: tuple(bounds) for family, bounds in given.items()}


def _are_bounds(values: list[Any]) -> bool:
    if not values or any(type(value) not in (int, float) for value in values):
        return False
    is_rising = all(low < high for low, high in itertools.pairwise(values))
    return bool(is_rising and values[0] >= 0 and values[-1] < math.inf)
