"""Turns vLLM's statistics of its steps into our StepStats."""

import time
from collections import Counter
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from coconut_serve.engines.base import OnStep
from coconut_serve.types import StepStats


class StepObserver(StatLoggerBase):
    """Counts rows by mode and phase; vLLM calls `record` once for each step's outputs.

    Args:
        on_step: Called with the statistics of each step.
    """

    def __init__(self, on_step: OnStep) -> None:
        self._on_step = on_step
        self.running: Counter[str] = Counter()  # mode -> requests with an output so far
        self.waiting: Counter[str] = Counter()
        self.num_blocks = 0
        self._rows: Counter[tuple[str, str]] = Counter()
        self._num_prefill_positions = 0
        self.num_engines = 1  # data parallel; num_blocks counts those of all
        self._num_used: dict[int, int] = {}  # engine -> blocks
        self._last: dict[int, float | None] = {}  # engine -> end of its last step; None while idle

    def log_engine_initialized(self) -> None:
        """Do nothing; vLLM calls it once."""

    def count_row(self, mode: str, phase: str) -> None:
        """Count one output of one request."""
        self._rows[mode, phase] += 1

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None:
            return
        now = time.monotonic()
        last = self._last.get(engine_idx)
        seconds = now - last if last is not None else 0.0
        is_idle = not scheduler_stats.num_running_reqs and not scheduler_stats.num_waiting_reqs
        self._last[engine_idx] = None if is_idle else now
        num_own = self.num_blocks / self.num_engines
        self._num_used[engine_idx] = round(scheduler_stats.kv_cache_usage * num_own)
        if iteration_stats is not None:
            self._num_prefill_positions = iteration_stats.num_prompt_tokens
        cache = scheduler_stats.prefix_cache_stats
        self._report(
            seconds,
            num_preemptions=iteration_stats.num_preempted_reqs if iteration_stats else 0,
            num_queries=cache.queries if cache else 0,
            num_hits=cache.hits if cache else 0,
        )

    def note_end(self) -> None:
        """Report once more after a request ends, so that gauges stay current."""
        self._report(0.0)

    def _report(
        self, seconds: float, *, num_preemptions: int = 0, num_queries: int = 0, num_hits: int = 0
    ) -> None:
        rows: dict[tuple[str, str], int] = {}
        if seconds:
            rows, self._rows = dict(self._rows), Counter()
        num_used = sum(self._num_used.values())
        self._on_step(
            StepStats(
                seconds=seconds,
                num_rows=rows,
                num_prefill_positions=self._num_prefill_positions,
                num_running=dict(self.running),
                num_waiting=dict(self.waiting),
                num_preemptions=num_preemptions,
                num_free_blocks=self.num_blocks - num_used,
                num_cached_blocks=0,  # vLLM counts them as free
                num_used_blocks=num_used,
                num_prefix_queries=num_queries,
                num_prefix_hits=num_hits,
            )
        )
