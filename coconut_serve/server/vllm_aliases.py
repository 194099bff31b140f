"""Our metrics under the `vllm:` names that public dashboards, gateways and autoscalers query.

Sums over reasoning modes. As in vLLM, thinking positions are generated tokens.
"""

from collections import defaultdict
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.registry import Collector

from coconut_serve.metrics import Metrics

_FINISHED = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "stop",
    "cancelled": "abort",
    "deadline": "abort",
    "error": "error",
}
# vLLM's name -> ours, summed
ALIASES: dict[str, tuple[str, ...]] = {
    "num_requests_running": ("requests_running",),
    "num_requests_waiting": ("requests_waiting",),
    "kv_cache_usage_perc": ("kv_cache_usage_ratio",),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens", "reasoning_tokens"),
    "request_success": ("requests",),
    "num_preemptions": ("preemptions",),
    "prefix_cache_queries": ("prefix_cache_queries",),
    "prefix_cache_hits": ("prefix_cache_hits",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds",),
    "request_time_per_output_token_seconds": ("time_per_output_token_seconds",),
    "e2e_request_latency_seconds": ("request_duration_seconds",),
    "request_queue_time_seconds": ("request_queue_seconds",),
    "request_prefill_time_seconds": ("request_prefill_seconds",),
    "request_decode_time_seconds": ("request_decode_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_generation_tokens": ("request_output_tokens",),
}


class VllmAliases(Collector):
    """Exposes our metrics a second time under vLLM's names.

    Args:
        metrics: Ours; the collector registers itself beside them.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._registry = metrics.registry
        self._registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Describe nothing: collecting here would recurse."""
        return ()

    def collect(self) -> Iterable[Metric]:
        names = [f"coconut_{source}" for sources in ALIASES.values() for source in sources]
        wanted = {name: self._registry._names_to_collectors[name] for name in names}
        ours = {name: next(iter(each.collect())) for name, each in wanted.items()}
        for alias, sources in ALIASES.items():
            families = [ours[f"coconut_{source}"] for source in sources]
            yield _renamed(f"vllm:{alias}", families)


def _renamed(alias: str, families: list[Metric]) -> Metric:
    sums: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for family in families:
        for sample in family.samples:
            suffix = sample.name.removeprefix(family.name)
            if sample.labels.get("outcome") == "rejected":
                continue
            labels = {"model_name": sample.labels["model_name"], "engine": "0"}
            if "le" in sample.labels:
                labels["le"] = sample.labels["le"]
            if "outcome" in sample.labels:
                labels["finished_reason"] = _FINISHED[sample.labels["outcome"]]
            sums[suffix, tuple(labels.items())] += sample.value
    metric = Metric(alias, f"As {families[0].name}, under vLLM's name.", families[0].type)
    for (suffix, items), value in sums.items():
        metric.add_sample(alias + suffix, dict(items), value)
    return metric
