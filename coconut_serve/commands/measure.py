"""Sends one request and measures what a client sees. Standard library only.

Works in threads and under gevent; the load tests use it too.
"""

import http.client
import json
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"


@dataclass(slots=True, kw_only=True)
class Record:
    """Outcome of one request; times in seconds since it was sent."""

    mode: str
    started: float  # time.time()
    scenario: str = "stream"
    status: int = 0  # 0: no response
    error: str = ""
    ttft: float | None = None  # first text or token of any kind
    ttfot: float | None = None  # first answer token
    gaps: list[float] = field(default_factory=list)  # between answer tokens
    e2e: float = 0.0
    num_answer_tokens: int = 0  # token ids seen in the stream
    text: str = ""  # of the answer
    is_right: bool | None = None  # None: not checked
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str = ""
    retry_after: str = ""

    @property
    def is_ok(self) -> bool:
        """Whether a complete answer arrived."""
        return self.status == 200 and not self.error and bool(self.finish_reason)

    @property
    def tpot(self) -> float | None:
        """Mean seconds between answer tokens."""
        return sum(self.gaps) / len(self.gaps) if self.gaps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Address and credentials of a server."""

    url: str
    api_key: str = ""
    timeout_seconds: float = 120.0

    def connect(self) -> http.client.HTTPConnection:
        """Open a new connection."""
        parts = urllib.parse.urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        return kind(parts.hostname or "127.0.0.1", parts.port, timeout=self.timeout_seconds)

    def release(
        self, connection: http.client.HTTPConnection, rest: http.client.HTTPResponse | None
    ) -> None:
        """Close a connection; a subclass may reuse it.

        Args:
            connection: From `connect`.
            rest: The response, to drain before reuse; None: its end was not reached.
        """
        del rest
        connection.close()

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every request."""
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def get(self, path: str) -> tuple[int, str]:
        """Send a GET; returns status and body."""
        connection = self.connect()
        try:
            connection.request("GET", path, headers=self.headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()


def ask(
    target: Target,
    body: dict[str, Any],
    *,
    scenario: str = "stream",
    path: str = CHAT,
    on_chunk: Callable[[int], bool] = lambda _: True,
) -> Record:
    """Send one request and read its response.

    Args:
        target: The server.
        body: Of the request; `stream` may be true or false.
        scenario: Kept in the record.
        path: Of the endpoint.
        on_chunk: Called with the index of each stream event; False disconnects.

    Returns:
        The outcome, connection errors included.
    """
    record = Record(
        mode=body.get("reasoning_mode", "default"), started=time.time(), scenario=scenario
    )
    start = time.perf_counter()
    connection = target.connect()
    rest: http.client.HTTPResponse | None = None
    try:
        connection.request("POST", path, body=json.dumps(body), headers=target.headers)
        response = connection.getresponse()
        record.status = response.status
        record.retry_after = response.headers.get("Retry-After", "")
        if response.status != 200:
            record.error = response.read(2000).decode(errors="replace")
        elif body.get("stream"):
            _follow(record, _events(response), start, on_chunk)
        else:
            _read(record, json.loads(response.read()))
        rest = response if record.is_ok or record.status != 200 else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        record.error = f"{type(error).__name__}: {error}"
    finally:
        record.e2e = time.perf_counter() - start
        target.release(connection, rest)
    return record


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Parse the JSON objects of a stream of server-sent events."""
    for line in response:
        if line.startswith(b"data: "):
            if line.startswith(b"data: [DONE]"):
                return
            yield json.loads(line[6:])
    raise ValueError("the stream ended without [DONE]")


def _follow(
    record: Record, events: Iterator[dict[str, Any]], start: float, on_chunk: Callable[[int], bool]
) -> None:
    last: float | None = None
    for number, event in enumerate(events):
        now = time.perf_counter() - start
        if "error" in event:
            record.error = json.dumps(event["error"])
            return
        record.usage = event.get("usage") or record.usage
        for choice in event.get("choices", []):
            delta = choice.get("delta", choice)
            tokens = len(choice.get("token_ids") or ())
            if tokens or delta.get("reasoning") or delta.get("content") or delta.get("text"):
                record.ttft = now if record.ttft is None else record.ttft
            if tokens:
                record.ttfot = now if record.ttfot is None else record.ttfot
                if last is not None:
                    record.gaps.append(now - last)
                last = now
                record.num_answer_tokens += tokens
            record.text += delta.get("content") or delta.get("text") or ""
            record.finish_reason = choice.get("finish_reason") or record.finish_reason
        if not on_chunk(number):
            record.error = "hung up"
            return


def _read(record: Record, answer: dict[str, Any]) -> None:
    record.usage = answer["usage"]
    [choice] = answer["choices"]
    record.finish_reason = choice["finish_reason"]
    record.num_answer_tokens = len(choice.get("token_ids") or ())
    record.text = choice.get("message", choice).get("content") or choice.get("text") or ""


def percentile(values: list[float], share: float) -> float:
    """Compute the `share` (0 to 1) quantile, linearly interpolated; NaN without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def describe(values: list[float]) -> dict[str, float]:
    """Compute mean, percentiles and maximum; empty without values."""
    if not values:
        return {}
    shares = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    return {
        "mean": sum(values) / len(values),
        **{name: percentile(values, share) for name, share in shares.items()},
        "max": max(values),
    }


def summarise(records: list[Record]) -> dict[str, Any]:
    """Compute counts, rates and latencies in seconds."""
    good = [r for r in records if r.is_ok]
    streams = [r for r in good if r.ttfot is not None]
    begun = min((r.started for r in records), default=0.0)
    seconds = max((r.started + r.e2e for r in records), default=0.0) - begun
    details = [r.usage.get("completion_tokens_details") or {} for r in good]
    tokens = sum(r.num_answer_tokens for r in good)
    steps = sum(d.get("reasoning_tokens", 0) for d in details)
    return {
        "requests": len(records),
        "ok": len(good),
        "looked_at": sum(r.is_right is not None for r in good),
        "right": sum(r.is_right is True for r in good),
        "seconds": seconds,
        "requests_per_second": len(good) / seconds if seconds else 0.0,
        "prompt_tokens": sum(r.usage.get("prompt_tokens", 0) for r in good),
        "answer_tokens": tokens,
        "answer_tokens_per_second": tokens / seconds if seconds else 0.0,
        "reasoning_steps": steps,
        "halts": sum(bool((r.usage.get("reasoning") or {}).get("halt_reason")) for r in good),
        "vector_steps": sum(
            d.get("latent_steps", 0) + d.get("distribution_steps", 0) for d in details
        ),
        "reasoning_steps_per_second": steps / seconds if seconds else 0.0,
        "ttft": describe([r.ttft for r in streams if r.ttft is not None]),
        "ttfot": describe([r.ttfot for r in streams if r.ttfot is not None]),
        "itl": describe([gap for r in streams for gap in r.gaps]),
        "tpot": describe([r.tpot for r in streams if r.tpot is not None]),
        "e2e": describe([r.e2e for r in good]),
    }
