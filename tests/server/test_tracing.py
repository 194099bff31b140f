"""Spans over OTLP, to a collector in this process."""

import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from coconut_serve.config import StubConfig
from coconut_serve.server.trace_context import TraceContextMiddleware
from coconut_serve.service.tracing import OtlpTracer
from tests.fakes import listening, stub_app

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
_PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """Its address, and the spans it has got."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans.extend(span for scope in group.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", spans
        server.shutdown()
        thread.join()


@pytest.fixture
async def traced(collector: tuple[str, list[Any]]) -> AsyncIterator[tuple[str, OtlpTracer]]:
    tracer = OtlpTracer(collector[0], model_name="m")
    app = stub_app(stub=StubConfig(fail_at_token=5))
    app.add_middleware(TraceContextMiddleware)
    async with listening(app) as url:
        app.state.service = dataclasses.replace(app.state.service, tracer=tracer)
        yield url, tracer
    tracer.stop()


def attributes(holder: Any) -> dict[str, Any]:
    found = {}
    for each in holder.attributes:
        kind = each.value.WhichOneof("value")
        found[each.key] = getattr(each.value, kind)
    return found


async def test_request_is_one_span_with_an_event_a_phase_below_its_callers(
    traced: tuple[str, OtlpTracer], collector: tuple[str, list[Any]]
) -> None:
    body = {"prompt": "abc", "max_tokens": 2, "reasoning_mode": "latent", "reasoning": {"steps": 3}}
    async with httpx.AsyncClient(base_url=traced[0]) as http:
        headers = {"traceparent": _PARENT, "x-request-id": "mine"}
        answer = await http.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 20})
    traced[1].stop()
    spans = {attributes(span).get("coconut.reasoning_mode"): span for span in collector[1]}
    assert len(collector[1]) == 2
    span = spans["latent"]
    assert span.trace_id.hex() == _PARENT.split("-")[1]
    assert span.parent_span_id.hex() == _PARENT.split("-")[2]
    assert span.name == "text_completion m"
    assert [event.name for event in span.events] == ["prefill", "thinking", "decode", "end"]
    assert attributes(span.events[1]) == {"choice": 0, "steps": 3, "halt_reason": "fixed"}
    told = attributes(span)
    assert told["gen_ai.request.id"].endswith("mine")
    assert (told["coconut.latent.steps"], told["gen_ai.usage.output_tokens"]) == (3, 2)
    assert spans["cot"].status.code == 2
    assert attributes(spans["cot"])["error.type"] == "generation_failed"
    assert "abc" not in str(collector[1]), "prompts are not traced"
