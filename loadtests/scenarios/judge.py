"""From records to a summary, and from a summary and an SLO file to a verdict."""

from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from coconut_serve.commands.measure import Record, describe, summarise
from loadtests.scenarios.clients import EXPECTED_OF_BAD, POLITE

_LATENCIES = ("ttft", "ttfot", "itl", "tpot", "e2e")


def summary(records: list[Record]) -> dict[str, Any]:
    """Everything that is reported of a run, by mode and by second."""
    polite = [r for r in records if r.scenario in POLITE]
    modes = sorted({r.mode for r in polite})
    statuses = Counter(f"{r.scenario} {r.status}" for r in records)
    refused = [r for r in polite if r.status in (429, 503)]
    return {
        "modes": {mode: summarise([r for r in polite if r.mode == mode]) for mode in modes},
        "all": summarise(polite),
        "scenarios": dict(Counter(r.scenario for r in records)),
        "statuses": dict(sorted(statuses.items())),
        "rejected": {
            "count": len(refused),
            "with_retry_after": sum(bool(r.retry_after) for r in refused),
            "e2e": describe([r.e2e for r in refused]),
        },
        "unexpected": _unexpected(records),
        "timeline": _timeline(polite),
    }


def _unexpected(records: list[Record]) -> list[str]:
    """What should never happen, at most twenty of it, in words."""
    found = []
    for r in records:
        if r.scenario == "bad":
            is_wrong = r.status not in EXPECTED_OF_BAD
        elif r.scenario in ("disconnect", "half"):
            is_wrong = r.status not in (0, 200, 429, 503) or r.error not in ("", "hung up")
            is_wrong = is_wrong and r.status not in (429, 503)
        else:
            is_wrong = not r.is_ok and r.status not in (429, 503)
        if is_wrong:
            found.append(f"{r.scenario} {r.mode}: {r.status} {r.error[:200]}")
    return found[:20] + ([f"and {len(found) - 20} more"] if len(found) > 20 else [])


def _timeline(records: list[Record]) -> list[dict[str, float]]:
    """Requests sent, answered and refused in each second of the run."""
    if not records:
        return []
    begin = min(r.started for r in records)
    sent = Counter(int(r.started - begin) for r in records)
    ended = Counter(int(r.started + r.e2e - begin) for r in records if r.is_ok)
    refused = Counter(int(r.started + r.e2e - begin) for r in records if r.status == 429)
    last = max([*sent, *ended])
    return [
        {"second": s, "sent": sent[s], "answered": ended[s], "refused": refused[s]}
        for s in range(last + 1)
    ]


def judge(
    told: dict[str, Any], slo: dict[str, Any], peak: dict[str, Any] | None = None
) -> list[str]:
    """What the run violates, in words; empty if nothing.

    `slo` has any of: min_requests, min_requests_per_second, max_rejected_ratio,
    max_unexpected, max_reject_p95_seconds, retry_after, min_goodput_of_peak (answered requests a
    second, as a share of the run `peak`'s), and modes: {MODE or "default":
    {ttft_p95_seconds: 1.5, ...}} with any latency and any of mean, p50, p90, p95, p99, max.
    """
    wrong: list[str] = []

    def check(name: str, value: float, limit: float, *, is_least: bool = False) -> None:
        if (value < limit) if is_least else not value <= limit:
            word = "below" if is_least else "above"
            wrong.append(f"{name} is {value:.4g}, {word} {limit:g}")

    total = told["all"]
    rejected = told["rejected"]
    check("unexpected outcomes", len(told["unexpected"]), slo.get("max_unexpected", 0))
    if "min_requests" in slo:
        check("answered requests", total["ok"], slo["min_requests"], is_least=True)
    if "min_requests_per_second" in slo:
        least = slo["min_requests_per_second"]
        check("requests/s", total["requests_per_second"], least, is_least=True)
    if "min_goodput_of_peak" in slo and peak is not None:
        share = total["requests_per_second"] / peak["all"]["requests_per_second"]
        check("goodput of peak", share, slo["min_goodput_of_peak"], is_least=True)
    ratio = rejected["count"] / max(1, total["requests"])
    check("rejected ratio", ratio, slo.get("max_rejected_ratio", 0.0))
    if "max_reject_p95_seconds" in slo and rejected["count"]:
        check("refusal p95 seconds", rejected["e2e"]["p95"], slo["max_reject_p95_seconds"])
    if slo.get("retry_after"):
        check("refusals without Retry-After", rejected["count"] - rejected["with_retry_after"], 0)
    for mode, measured in told["modes"].items():
        for name, limit in (
            slo.get("modes", {}).get(mode, slo.get("modes", {}).get("default", {})).items()
        ):
            latency, share = name.removesuffix("_seconds").rsplit("_", 1)
            assert latency in _LATENCIES, name
            if measured[latency]:
                check(f"{mode}: {name}", measured[latency][share], limit)
    return wrong


def read_slo(path: str) -> dict[str, Any]:
    """The SLO file."""
    slo = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    assert isinstance(slo, dict), f"{path} must hold a mapping"
    return slo
