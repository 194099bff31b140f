"""Reads the caller's trace from its headers; only with --otlp-traces-endpoint."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from coconut_serve.service.tracing import attach_context


class TraceContextMiddleware:
    """Makes the span of a request a child of its caller's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        names = ("traceparent", "tracestate")
        detach = attach_context({name: headers[name] for name in names if name in headers})
        try:
            await self._app(scope, receive, send)
        finally:
            detach()
