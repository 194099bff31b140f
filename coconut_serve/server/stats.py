"""One log line every ten seconds while there is work: throughput, batch, cache."""

import asyncio
import logging
import time

from coconut_serve.metrics import Metrics

logger = logging.getLogger(__name__)

_INTERVAL_SECONDS = 10.0


async def log_stats(metrics: Metrics, *, interval_seconds: float = _INTERVAL_SECONDS) -> None:
    """Log the activity of each interval until cancelled; silent while idle."""
    m = metrics
    counters = {
        "prompt_tokens": m.prompt_tokens,
        "answer_tokens": m.generation_tokens,
        "thinking_steps": m.reasoning_tokens,
        "latent_steps": m.latent_steps,
        "prefix_queries": m.prefix_queries,
        "prefix_hits": m.prefix_hits,
        "ended": m.requests,
        "rejected": m.rejections,
    }
    before = {name: m.total(counter) for name, counter in counters.items()}
    then, was_idle = time.monotonic(), True
    while True:
        await asyncio.sleep(interval_seconds)
        after = {name: m.total(counter) for name, counter in counters.items()}
        now = time.monotonic()
        gained = {name: after[name] - before[name] for name in counters}
        running, waiting = m.total(m.running), m.total(m.waiting)
        gained["ended"] -= gained["rejected"]  # `requests` counts those too
        is_idle = not running and not waiting and not any(gained.values())
        if not (is_idle and was_idle):
            _log(gained, now - then, running, waiting, m.total(m.kv_usage))
        before, then, was_idle = after, now, is_idle


def _log(
    gained: dict[str, float], seconds: float, running: float, waiting: float, kv_usage: float
) -> None:
    queries, hits = gained.pop("prefix_queries"), gained.pop("prefix_hits")
    hit_ratio = hits / queries if queries else 0.0
    rates = {f"{name}_per_second": round(count / seconds, 1) for name, count in gained.items()}
    logger.info(
        "prompt %.1f tokens/s, answers %.1f tokens/s, thinking %.1f steps/s (%.1f of vectors), "
        "%.1f sequences/s (%.1f rejected), %d running, %d waiting, KV cache %.0f%%, "
        "prefix cache hits %.0f%%",
        *rates.values(),
        running,
        waiting,
        kv_usage * 100,
        hit_ratio * 100,
        extra={
            **rates,
            "running": running,
            "waiting": waiting,
            "kv_cache_usage_ratio": round(kv_usage, 3),
            "prefix_cache_hit_ratio": round(hit_ratio, 3),
        },
    )
