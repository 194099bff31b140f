"""The Grafana dashboard, from a table of panels; deploy.generate writes it as JSON."""

from dataclasses import dataclass
from typing import Any

_OF = 'job=~"$job",model_name=~"$model"'
_BY_MODE = "sum by (reasoning_mode)"
_WIDTH, _HEIGHT = 8, 8  # three panels per row of Grafana's 24 columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One graph."""

    title: str
    unit: str  # Grafana's name
    queries: dict[str, str]  # legend -> PromQL
    text: str = ""  # shown under the i
    is_stacked: bool = False


def _rate(metric: str, by: str = _BY_MODE, more: str = "") -> str:
    return f"{by} (rate({metric}{{{_OF}{more}}}[$__rate_interval]))"


def _sum(metric: str, by: str = _BY_MODE) -> str:
    return f"{by} ({metric}{{{_OF}}})"


def _quantile(share: float, metric: str, by: str = "reasoning_mode") -> str:
    rate = f"rate({metric}_bucket{{{_OF}}}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (le, {by}) ({rate}))"


def _quantiles(title: str, metric: str, text: str = "") -> Panel:
    queries = {
        f"p{round(share * 100)} {{{{reasoning_mode}}}}": _quantile(share, metric)
        for share in (0.5, 0.95)
    }
    return Panel(title=title, unit="s", queries=queries, text=text)


def _ratio(part: str, whole: str) -> str:
    return f"{_rate(part, 'sum')} / {_rate(whole, 'sum')}"


_MODE = "{{reasoning_mode}}"
ROWS: dict[str, list[Panel]] = {
    "Service": [
        Panel(
            title="Sequences ended",
            unit="reqps",
            queries={"{{outcome}}": _rate("coconut_requests_total", "sum by (outcome)")},
            text="Rejected: requests that began no sequence.",
            is_stacked=True,
        ),
        Panel(
            title="Error responses",
            unit="reqps",
            queries={
                "{{status}}": "sum by (status) (rate(coconut_http_requests_total"
                f'{{{_OF},status=~"4..|5.."}}[$__rate_interval])) or vector(0)',
                "refused: {{reason}}": _rate(
                    "coconut_admission_rejections_total", "sum by (reason)"
                ),
            },
        ),
        Panel(
            title="Up and ready",
            unit="short",
            queries={
                "scraped": 'sum(up{job=~"$job"})',
                "engine up": _sum("coconut_engine_up", "sum"),
                "ready": _sum("coconut_ready", "sum"),
                "restarts": _sum("coconut_engine_restarts_total", "sum"),
            },
        ),
    ],
    "Latency as a client sees it": [
        _quantiles(
            "Time to first token",
            "coconut_time_to_first_token_seconds",
            "The first result of any kind; a latent step counts.",
        ),
        _quantiles(
            "Time to first answer token",
            "coconut_time_to_first_output_token_seconds",
            "After the thinking: what a user waits for.",
        ),
        _quantiles("Between answer tokens", "coconut_inter_token_latency_seconds"),
        _quantiles("Whole request", "coconut_request_duration_seconds"),
        _quantiles("In the queue", "coconut_request_queue_seconds"),
        _quantiles("Time per answer token", "coconut_time_per_output_token_seconds"),
    ],
    "Thinking": [
        _quantiles("Thinking phase", "coconut_latent_phase_seconds"),
        Panel(
            title="Latent and soft steps",
            unit="ops",
            queries={_MODE: _rate("coconut_latent_steps_total")},
            text="Positions fed as a vector, a second.",
            is_stacked=True,
        ),
        Panel(
            title="Steps of a sequence, mean",
            unit="short",
            queries={
                _MODE: f"{_rate('coconut_latent_steps_per_request_sum')} / "
                f"{_rate('coconut_latent_steps_per_request_count')}"
            },
        ),
        Panel(
            title="Why thinking ended",
            unit="ops",
            queries={"{{reason}}": _rate("coconut_latent_halts_total", "sum by (reason)")},
            is_stacked=True,
        ),
        Panel(
            title="One step that feeds a vector",
            unit="s",
            queries={
                f"p50 {_MODE}": _quantile(0.5, "coconut_latent_step_seconds"),
                f"p95 {_MODE}": _quantile(0.95, "coconut_latent_step_seconds"),
            },
        ),
        Panel(
            title="Thinking for an answer token",
            unit="short",
            queries={
                _MODE: f"{_rate('coconut_reasoning_tokens_total')} / "
                f"{_rate('coconut_generation_tokens_total')}"
            },
        ),
    ],
    "Throughput and batch": [
        Panel(
            title="Tokens",
            unit="short",
            queries={
                "prompt": _rate("coconut_prompt_tokens_total", "sum"),
                "answer": _rate("coconut_generation_tokens_total", "sum"),
                "thinking": _rate("coconut_reasoning_tokens_total", "sum"),
                "wasted": _rate("coconut_wasted_tokens_total", "sum"),
            },
            text="A second. Wasted: computed for clients that went away.",
        ),
        Panel(
            title="Rows of a step, by mode and kind",
            unit="short",
            queries={
                "{{reasoning_mode}} {{phase}}": "sum by (reasoning_mode, phase) "
                f"(avg_over_time(coconut_batch_sequences{{{_OF}}}[$__rate_interval])) > 0 "
                f"or {_sum('coconut_batch_sequences', 'sum')}"
            },
            text="Several kinds at once: one batch for all modes.",
            is_stacked=True,
        ),
        Panel(
            title="Duration of a step",
            unit="s",
            queries={
                "p50 {{phase}}": _quantile(0.5, "coconut_engine_step_seconds", "phase"),
                "p99 {{phase}}": _quantile(0.99, "coconut_engine_step_seconds", "phase"),
            },
        ),
    ],
    "Queue and cache": [
        Panel(
            title="Running and waiting",
            unit="short",
            queries={
                f"running {_MODE}": _sum("coconut_requests_running"),
                f"waiting {_MODE}": _sum("coconut_requests_waiting"),
            },
            is_stacked=True,
        ),
        Panel(
            title="KV cache",
            unit="percentunit",
            queries={
                "in use, most": f"max(coconut_kv_cache_usage_ratio{{{_OF}}})",
                "prompt tokens found": _ratio(
                    "coconut_prefix_cache_hits_total", "coconut_prefix_cache_queries_total"
                ),
            },
        ),
        Panel(
            title="Pressure",
            unit="ops",
            queries={
                "preemptions": _rate("coconut_preemptions_total", "sum"),
                "cancelled {{stage}}": _rate("coconut_cancelled_total", "sum by (stage)"),
                "slow clients dropped": _rate("coconut_slow_client_drops_total", "sum"),
                "buffered results": _sum("coconut_sse_buffered_chunks", "sum"),
            },
        ),
    ],
    "Process": [
        Panel(
            title="Memory",
            unit="bytes",
            queries={
                "{{instance}}": 'process_resident_memory_bytes{job=~"$job"}',
                "{{instance}} engine": (
                    'coconut_engine_process_resident_memory_bytes{job=~"$job"}'
                ),
            },
        ),
        Panel(
            title="CPU",
            unit="short",
            queries={
                "{{instance}}": 'rate(process_cpu_seconds_total{job=~"$job"}[$__rate_interval])',
                "{{instance}} engine": (
                    'rate(coconut_engine_process_cpu_seconds_total{job=~"$job"}[$__rate_interval])'
                ),
            },
        ),
        Panel(
            title="Open files",
            unit="short",
            queries={"{{instance}}": 'process_open_fds{job=~"$job"}'},
        ),
    ],
}


def build() -> dict[str, Any]:
    """Build the dashboard as Grafana's JSON."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in ROWS.items():
        at = {"x": 0, "y": y, "w": 24, "h": 1}
        panels.append({"type": "row", "title": row, "gridPos": at, "panels": []})
        y += 1
        for index, panel in enumerate(members):
            x, down = index % 3 * _WIDTH, index // 3 * _HEIGHT
            panels.append(_panel(panel, {"x": x, "y": y + down, "w": _WIDTH, "h": _HEIGHT}))
        y += -(-len(members) // 3) * _HEIGHT
    for number, each in enumerate(panels, 1):
        each["id"] = number
    return {
        "uid": "coconut-serve",
        "title": "coconut-serve",
        "tags": ["coconut-serve", "llm"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source(), _variable("job"), _variable("model", "model_name")]},
        "panels": panels,
    }


def _panel(panel: Panel, at: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    custom = {"fillOpacity": 10, "showPoints": "never"}
    if panel.is_stacked:
        custom |= {"fillOpacity": 40, "stacking": {"mode": "normal", "group": "A"}}
    targets = [
        {"refId": chr(65 + i), "datasource": source, "expr": query, "legendFormat": legend}
        for i, (legend, query) in enumerate(panel.queries.items())
    ]
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": source,
        "gridPos": at,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list"}},
        "targets": targets,
    }


def _source() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}


def _variable(name: str, label: str | None = None) -> dict[str, Any]:
    query = f"label_values(coconut_build_info, {label or name})"
    return {
        "name": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }
