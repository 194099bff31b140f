"""What watches the server, as its settings ask: the log, traces, vLLM's names, a port."""

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
    """Set up the log, what the metrics page shows, and the tracer that the service is to use.

    Raises:
        StartupError: Traces are asked for and their packages are not there.
    """
    set_format(config.log_format)
    ProcessCollector(registry=metrics.registry)
    if config.vllm_metric_aliases:
        VllmAliases(metrics)
    if not config.otlp_traces_endpoint:
        return NoTracer()
    return OtlpTracer(config.otlp_traces_endpoint, model_name=config.served_model_name)


def attach(app: FastAPI, config: ServeConfig) -> None:
    """Add to the application what serves the above.

    Raises:
        StartupError: The metrics' own port cannot be had.
    """
    if config.metrics_port is not None:
        add_metrics_port(app, host=config.host, port=config.metrics_port)
    if config.otlp_traces_endpoint:
        app.add_middleware(TraceContextMiddleware)


def watch_process(metrics: Metrics, pid: Callable[[], int]) -> None:
    """Show memory and CPU of the engine's own process beside ours."""
    ProcessCollector(namespace="coconut_engine", pid=pid, registry=metrics.registry)
