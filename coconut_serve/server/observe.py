"""Sets up what observes the server: log, traces, vLLM's metric names, metrics port."""

from collections.abc import Callable

from fastapi import FastAPI
from prometheus_client import ProcessCollector

from coconut_serve.config import ServeConfig
from coconut_serve.metrics import Metrics
from coconut_serve.server.logs import set_format
from coconut_serve.server.metrics_port import add_metrics_port
from coconut_serve.server.trace_context import TraceContextMiddleware
from coconut_serve.server.vllm_aliases import VllmAliases
from coconut_serve.service.tracing import NoTracer, OtlpTracer, Tracer


def prepare(config: ServeConfig, metrics: Metrics) -> Tracer:
    """Set up the log and the metrics page, and return the service's tracer.

    Raises:
        StartupError: Traces are on and their packages are not installed.
    """
    set_format(config.log_format)
    ProcessCollector(registry=metrics.registry)
    if config.vllm_metric_aliases:
        VllmAliases(metrics)
    if not config.otlp_traces_endpoint:
        return NoTracer()
    return OtlpTracer(config.otlp_traces_endpoint, model_name=config.served_model_name)


def attach(app: FastAPI, config: ServeConfig) -> None:
    """Add the metrics port and the caller's trace context to the application.

    Raises:
        StartupError: The metrics port is not available.
    """
    if config.metrics_port is not None:
        add_metrics_port(app, host=config.host, port=config.metrics_port)
    if config.otlp_traces_endpoint:
        app.add_middleware(TraceContextMiddleware)


def watch_process(metrics: Metrics, pid: Callable[[], int]) -> None:
    """Show memory and CPU of the engine's own process beside ours."""
    ProcessCollector(namespace="coconut_engine", pid=pid, registry=metrics.registry)
