"""One OpenTelemetry span per request, with an event at each phase; off by default."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import coconut_serve
from coconut_serve.errors import StartupError
from coconut_serve.service.prompt import Prepared

Value = str | int | float | bool


class Span(Protocol):
    """The span of one request."""

    def event(self, name: str, attributes: dict[str, Value]) -> None:
        """Record an event at the present time."""

    def end(self, attributes: dict[str, Value], error: Exception | None) -> None:
        """Close the span; called once."""


class Tracer(Protocol):
    """Makes spans."""

    def start(self, prepared: Prepared) -> Span:
        """Open the span of a request, below the context of its HTTP request."""

    def stop(self) -> None:
        """Send pending spans."""


class NoTracer:
    """Traces nothing."""

    def start(self, prepared: Prepared) -> Span:
        del prepared
        return _NoSpan()

    def stop(self) -> None:
        pass


class _NoSpan:
    def event(self, name: str, attributes: dict[str, Value]) -> None:
        pass

    def end(self, attributes: dict[str, Value], error: Exception | None) -> None:
        pass


class OtlpTracer:
    """Sends spans over OTLP/HTTP, in batches, from a thread of its own.

    Args:
        endpoint: Full address, such as http://collector:4318/v1/traces.
        model_name: As clients know it.

    Raises:
        StartupError: The packages of the extra `otlp` are not installed.
    """

    def __init__(self, endpoint: str, *, model_name: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise StartupError(
                "--otlp-traces-endpoint needs more packages: "
                "pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http",
                param="--otlp-traces-endpoint",
            ) from error
        version = coconut_serve.__version__
        resource = Resource.create({"service.name": "coconut-serve", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("coconut_serve", version)
        self._model_name = model_name

    def start(self, prepared: Prepared) -> Span:
        from opentelemetry.trace import SpanKind

        ask, sampling = prepared.ask, prepared.requests[0].sampling
        operation = "text_completion" if ask.endpoint == "completions" else "chat"
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "coconut-serve",
            "gen_ai.request.model": self._model_name,
            "gen_ai.request.id": ask.request_id,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.choice.count": ask.n,
            "coconut.reasoning_mode": prepared.mode,
        }
        span = self._tracer.start_span(
            f"{operation} {self._model_name}", kind=SpanKind.SERVER, attributes=attributes
        )
        return _OtlpSpan(span)

    def stop(self) -> None:
        self._provider.shutdown()


class _OtlpSpan:
    def __init__(self, span: Any) -> None:
        self._span = span

    def event(self, name: str, attributes: dict[str, Value]) -> None:
        self._span.add_event(name, attributes, timestamp=time.time_ns())

    def end(self, attributes: dict[str, Value], error: Exception | None) -> None:
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attributes(attributes)
        if error is not None:
            self._span.set_attribute("error.type", getattr(error, "code", type(error).__name__))
            self._span.set_status(Status(StatusCode.ERROR, str(error)))
        self._span.end()


def attach_context(headers: dict[str, str]) -> Callable[[], None]:
    """Parent this task's spans to the caller's trace (W3C traceparent); return what undoes it."""
    from opentelemetry import context, propagate

    token = context.attach(propagate.extract(headers))
    return lambda: context.detach(token)
