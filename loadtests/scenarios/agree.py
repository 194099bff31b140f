"""Whether the server's metrics say what its clients saw; the server had no other clients."""

from collections import defaultdict
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Page = dict[tuple[str, str], float]  # (series, mode or "") -> sum over the other labels

# ours, in a summary of the clients -> the server's counter
_COUNTS = {
    "prompt_tokens": "coconut_prompt_tokens_total",
    "answer_tokens": "coconut_generation_tokens_total",
    "reasoning_steps": "coconut_reasoning_tokens_total",
    "halts": "coconut_latent_halts_total",
    "vector_steps": "coconut_latent_steps_total",
}
_TIMES = {
    "ttfot": "coconut_time_to_first_output_token_seconds",
    "itl": "coconut_inter_token_latency_seconds",
    "e2e": "coconut_request_duration_seconds",
}


def read_page(text: str) -> Page:
    """Sum a metrics page over all labels but the mode (and the histogram's bounds)."""
    page: Page = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            bound = sample.labels.get("le")
            name = f"{sample.name}:{float(bound)}" if bound else sample.name
            page[name, sample.labels.get("reasoning_mode", "")] += sample.value
    return page


def compare(before: Page, after: Page, told: dict[str, Any], *, tolerance: float) -> dict[str, Any]:
    """Compare a run's difference with the clients' summary.

    Counts must be equal. Mean times must agree within `tolerance`, or 2 ms; the clients' median
    must lie in the server's median bucket or beside it. Only for runs without a refusal.
    """
    rows: list[dict[str, Any]] = []
    for mode, client in told["modes"].items():

        def gained(name: str, mode: str = mode) -> float:
            return after.get((name, mode), 0.0) - before.get((name, mode), 0.0)

        ended = gained("coconut_requests_total")
        rows.append(_row(mode, "requests", client["requests"], ended, 0.0))
        for ours, series in _COUNTS.items():
            rows.append(_row(mode, ours, client[ours], gained(series), 0.0))
        for ours, series in _TIMES.items():
            count = gained(f"{series}_count")
            if client[ours] and count:
                mean = gained(f"{series}_sum") / count
                rows.append(_row(mode, f"{ours} mean", client[ours]["mean"], mean, tolerance))
                rows.append(_median_row(mode, ours, client[ours]["p50"], series, gained, after))
    return {"agrees": all(row["agrees"] for row in rows), "rows": rows}


def _row(mode: str, what: str, client: float, server: float, tolerance: float) -> dict[str, Any]:
    slack = max(tolerance * max(client, server), 0.002) if tolerance else 0.0
    agrees = abs(client - server) <= slack
    return {"mode": mode, "what": what, "client": client, "server": server, "agrees": agrees}


def _median_row(
    mode: str, what: str, client: float, series: str, gained: Any, page: Page
) -> dict[str, Any]:
    """A histogram knows its median only as a bucket."""
    start = f"{series}_bucket:"
    bounds = sorted(float(n[len(start) :]) for n, m in page if m == mode and n.startswith(start))
    half = gained(f"{series}_count") / 2
    at = next(i for i, b in enumerate(bounds) if gained(f"{start}{b}") >= half)
    low, high = ([0.0, *bounds])[max(0, at - 1)], bounds[min(at + 1, len(bounds) - 1)]
    agrees = low <= client <= high
    return {
        "mode": mode,
        "what": f"{what} median, in",
        "client": client,
        "server": [low, high],
        "agrees": agrees,
    }
