"""Every Prometheus name, label and bucket. The registry is an argument.

Prefix coconut_, base units, _total for counters; labels are the model, the engine, the mode and
closed sets of reasons, all declared at start so that rate() works from the first event. Never a
request id.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
)
from prometheus_client.registry import Collector

from coconut_serve.buckets import BUCKETS
from coconut_serve.reasoning.registry import Feeds
from coconut_serve.types import HaltReason, StepStats, WaitReason

# deadline: cut short by --drain-seconds. tool_calls: by nothing until tools are supported.
OUTCOMES = ("stop", "length", "tool_calls", "cancelled", "rejected", "deadline", "error")
UNKNOWN = "unknown"  # the mode of a request that was refused before it was known
ENDPOINTS = ("chat", "completions", "responses")
REJECTIONS = ("queue_full", "loading", "draining", "too_long", "invalid")
WAIT_REASONS: tuple[WaitReason, ...] = get_args(WaitReason)
STAGES = ("queued", "thinking", "decode")
FED_VECTORS = (Feeds.HIDDEN.value, Feeds.MIXTURE.value)
PHASES = ("prefill", *FED_VECTORS, Feeds.TOKEN.value)
STEP_KINDS = (*(f"pure_{phase}" for phase in PHASES[1:]), "mixed", "prefill")
LIMITS = ("max_model_len", "max_num_seqs", "max_queue", "kv_cache_positions", "dtype", "device")
HALTS = tuple(reason.label for reason in HaltReason if reason is not HaltReason.NONE)
_STEP_WEIGHT = 0.1  # of the last step in the mean

MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)
_Labels = dict[str, tuple[str, ...] | None]  # name -> its values; None: open, not declared


class _Included(Collector):
    """Reads some metrics of another registry when a page is made."""

    def __init__(self, source: CollectorRegistry, prefix: str) -> None:
        self._source, self._prefix = source, prefix

    def describe(self) -> Iterable[Metric]:
        """Name none in advance: they come and go with what registers them."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Pass them on."""
        return (m for m in self._source.collect() if m.name.startswith(self._prefix))


class Metrics:
    """All metrics of one served model.

    Args:
        registry: Where they are registered; a fresh one in tests.
        model_name: Label.
        engine: Label.
        modes: Label values to declare.
        buckets: Bounds of histograms instead of those of BUCKETS.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model_name: str,
        engine: str,
        modes: Iterable[str],
        buckets: Mapping[str, tuple[float, ...]] = BUCKETS,
    ) -> None:
        # No _created beside each counter and histogram: nobody asks for them.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations
        self.registry = registry
        self._base = {"model_name": model_name, "engine": engine}
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        self._modes = tuple(modes)
        self._num_restarts = 0
        self.mean_step_seconds = 0.0  # of the last some; 0 before the first
        self._buckets = {**BUCKETS, **buckets}
        mode: _Labels = {"reasoning_mode": self._modes}
        self._declare_work(mode)
        self._declare_times(mode)
        self._declare_state(mode)

    # fmt: off
    def _declare_work(self, mode: _Labels) -> None:
        """What is asked, and what steps make of it."""
        self.requests = self._counter("requests", "Sequences ended, and requests rejected.", reasoning_mode=(*self._modes, UNKNOWN), endpoint=ENDPOINTS, outcome=OUTCOMES)
        self.errors = self._counter("request_errors", "Error responses.", endpoint=None, code=None, status=None)
        self.rejections = self._counter("admission_rejections", "Requests not taken.", reason=REJECTIONS)
        self.ignored_params = self._counter("ignored_params", "Unknown request fields that were ignored.")
        self.running = self._gauge("requests_running", "Sequences holding a slot.", **mode)
        self.waiting = self._gauge("requests_waiting", "Sequences waiting for one.", **mode, reason=WAIT_REASONS)

        self.batch = self._gauge("batch_sequences", "Rows of the last step.", **mode, phase=PHASES)
        self.batch_per_step = self._histogram("batch_sequences_per_step", "Rows of a step.", "batch_sequences")
        self.mixed_steps = self._counter("mixed_steps", "Steps by whether they hold several kinds of row.", kind=("pure", "mixed"))
        self.step_seconds = self._histogram("engine_step_seconds", "Duration of a step.", "step_latency", phase=STEP_KINDS)
        self.latent_step_seconds = self._histogram("latent_step_seconds", "Duration of a step that fed a vector, per sequence.", "step_latency", **mode)

        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens.", **mode)
        self.cached_tokens = self._counter("prompt_tokens_cached", "Prompt tokens taken from the prefix cache.", **mode)
        self.generation_tokens = self._counter("generation_tokens", "Answer tokens.", **mode)
        self.reasoning_tokens = self._counter("reasoning_tokens", "Thinking positions of any kind.", **mode)
        self.latent_steps = self._counter("latent_steps", "Positions fed as a vector.", **mode)
        self.wasted_tokens = self._counter("wasted_tokens", "Positions computed for sequences that were cancelled.", **mode)
        self.halts = self._counter("latent_halts", "Thinking phases ended.", **mode, reason=HALTS)
        self.cancelled = self._counter("cancelled", "Sequences cancelled by the client.", **mode, stage=STAGES)
        self.latent_steps_per_request = self._histogram("latent_steps_per_request", "Positions fed as a vector.", "latent_steps", **mode)
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", "request_tokens", **mode)
        self.request_output_tokens = self._histogram("request_output_tokens", "Answer tokens of a sequence.", "request_tokens", **mode)

    def _declare_times(self, mode: _Labels) -> None:
        """How long it takes."""
        self.ttft = self._histogram("time_to_first_token_seconds", "Arrival to the first step's result.", "time_to_first_token", **mode)
        self.ttfot = self._histogram("time_to_first_output_token_seconds", "Arrival to the first answer token.", "time_to_first_token", **mode)
        self.itl = self._histogram("inter_token_latency_seconds", "Between answer tokens.", "inter_token_latency", **mode)
        self.tpot = self._histogram("time_per_output_token_seconds", "Mean gap of a sequence.", "inter_token_latency", **mode)
        self.duration = self._histogram("request_duration_seconds", "Arrival to the end.", "request_latency", **mode)
        self.queue = self._histogram("request_queue_seconds", "Arrival to first step.", "time_to_first_token", **mode)
        self.prefill = self._histogram("request_prefill_seconds", "First step to its first result.", "time_to_first_token", **mode)
        self.latent_phase = self._histogram("latent_phase_seconds", "Prefill to the end of thinking.", "time_to_first_token", **mode)
        self.decode = self._histogram("request_decode_seconds", "First answer token to the end.", "request_latency", **mode)

    def _declare_state(self, mode: _Labels) -> None:
        """How the engine and the server are."""
        self.kv_blocks = self._gauge("kv_blocks", "Blocks of the KV cache.", state=("used", "cached", "free"))
        self.kv_usage = self._gauge("kv_cache_usage_ratio", "Blocks in use, 0 to 1.")
        self.prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up.")
        self.prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found.")
        self.preemptions = self._counter("preemptions", "Sequences preempted.")
        self.sequence_preemptions = self._histogram("sequence_preemptions", "Preemptions of a sequence.", "request_num_preemptions", **mode)
        self.engine_up = self._gauge("engine_up", "1 while the engine works.")
        self.engine_restarts = self._counter("engine_restarts", "Recoveries from a failed step.")
        self.ready = self._gauge("ready", "1 while new work is accepted.")
        self.load_seconds = self._gauge("model_load_seconds", "Time to load the model.")
        self.build_info = self._gauge("build_info", "Always 1.", version=None, commit=None, torch=None)
        self.config_info = self._gauge("config_info", "Always 1; limits in force.", **dict.fromkeys(LIMITS))

        self.buffered = self._gauge("sse_buffered_chunks", "Results that wait to be sent.")
        self.slow_drops = self._counter("slow_client_drops", "Streams ended because nobody read them.")
        self.http_requests = self._counter("http_requests", "HTTP requests answered.", method=None, route=None, status=None)
        self.http_seconds = self._histogram("http_request_duration_seconds", "Arrival to the last byte.", "request_latency", method=None, route=None)
    # fmt: on

    def _counter(self, name: str, text: str, **labels: tuple[str, ...] | None) -> Counter:
        return self._declare(Counter, name, text, labels)

    def _gauge(self, name: str, text: str, **labels: tuple[str, ...] | None) -> Gauge:
        return self._declare(Gauge, name, text, labels)

    def _histogram(
        self, name: str, text: str, family: str, **labels: tuple[str, ...] | None
    ) -> Histogram:
        return self._declare(Histogram, name, text, labels, buckets=self._buckets[family])

    def _declare(
        self, kind: type[MetricT], name: str, text: str, labels: _Labels, **options: Any
    ) -> MetricT:
        """Create a metric and every child, so that each series is there from the start."""
        names = (*self._base, *labels)
        metric = kind(f"coconut_{name}", text, names, registry=self.registry, **options)
        known = [values for values in labels.values() if values is not None]
        if len(known) == len(labels):
            for combination in itertools.product(*known):
                metric.labels(*self._base.values(), *combination)
        return metric

    def _child(self, metric: MetricT, labels: tuple[str, ...]) -> MetricT:
        """One series; looked up in a dictionary, since some hundred a step are written."""
        child: MetricT | None = self._children.get((metric, labels))
        if child is None:
            child = metric.labels(*self._base.values(), *labels)
            self._children[metric, labels] = child
        return child

    def observe(self, metric: Histogram, value: float, *labels: str) -> None:
        """Add an observation; labels beyond model and engine."""
        self._child(metric, labels).observe(value)

    def add(self, metric: Counter, count: float, *labels: str) -> None:
        """Add to a counter."""
        self._child(metric, labels).inc(count)

    def set(self, metric: Gauge, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._child(metric, labels).set(value)

    def shift(self, metric: Gauge, change: float) -> None:
        """Add to a gauge without labels of its own."""
        self._child(metric, ()).inc(change)

    def total(self, metric: Counter | Gauge) -> float:
        """Sum over all label values."""
        return sum(sample.value for family in metric.collect() for sample in family.samples)

    def observe_restarts(self, total: int) -> None:
        """Follow an engine's own count of its restarts."""
        self.add(self.engine_restarts, total - self._num_restarts)
        self._num_restarts = total

    def include(self, source: CollectorRegistry, *, prefix: str) -> None:
        """Show the metrics of another registry, those whose name begins so, on the same page."""
        self.registry.register(_Included(source, prefix))

    def observe_step(self, stats: StepStats) -> None:
        """Record one engine step; called from the engine's thread."""
        for mode in self._modes:
            self.set(self.running, stats.num_running.get(mode, 0), mode)
            for reason in WAIT_REASONS:
                count = stats.num_waiting.get(mode, 0) if reason == stats.wait_reason else 0
                self.set(self.waiting, count, mode, reason)
            for phase in PHASES:
                self.set(self.batch, stats.num_rows.get((mode, phase), 0), mode, phase)
        self._observe_blocks(stats)
        if not stats.num_rows:
            return
        before = self.mean_step_seconds or stats.seconds
        self.mean_step_seconds = before + _STEP_WEIGHT * (stats.seconds - before)
        kinds = {phase for _, phase in stats.num_rows}
        self.observe(self.batch_per_step, sum(stats.num_rows.values()))
        self.add(self.mixed_steps, 1, "pure" if len(kinds) == 1 else "mixed")
        phase = f"pure_{next(iter(kinds))}" if len(kinds) == 1 else "mixed"
        self.observe(self.step_seconds, stats.seconds, "prefill" if "prefill" in kinds else phase)
        for (mode, row_phase), count in stats.num_rows.items():
            if row_phase in FED_VECTORS:
                for _ in range(count):
                    self.observe(self.latent_step_seconds, stats.seconds, mode)

    def _observe_blocks(self, stats: StepStats) -> None:
        used, cached, free = stats.num_used_blocks, stats.num_cached_blocks, stats.num_free_blocks
        for state, count in (("used", used), ("cached", cached), ("free", free)):
            self.set(self.kv_blocks, count, state)
        self.set(self.kv_usage, used / max(1, used + cached + free))
        self.add(self.preemptions, stats.num_preemptions)
        self.add(self.prefix_queries, stats.num_prefix_queries)
        self.add(self.prefix_hits, stats.num_prefix_hits)
