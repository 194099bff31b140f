"""Turns every error into OpenAI's error body, and counts it."""

import logging
from typing import Any

from pydantic import ValidationError
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from coconut_serve.errors import CoconutError, InvalidRequestError
from coconut_serve.metrics import UNKNOWN, Metrics

logger = logging.getLogger(__name__)

_RETRY_AFTER_SECONDS = 5  # of a 503 without an estimate
_MAX_MESSAGE = 1000  # characters; an error never repeats a large body
_MAX_PARAM = 200
ENDPOINTS = {  # path -> label
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/responses": "responses",
}
_REFUSALS = (400, 404, 413, 415)  # of a request that will never be served as it is
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}


def error_body(error: CoconutError) -> dict[str, Any]:
    """OpenAI's ErrorObject."""
    return {
        "error": {
            "message": error.message[:_MAX_MESSAGE],
            "type": error.error_type,
            "param": error.param if error.param is None else error.param[:_MAX_PARAM],
            "code": error.code,
        }
    }


def error_response(error: CoconutError) -> JSONResponse:
    """The error as a response; headers tell clients whether and when to retry."""
    headers = {}
    if error.retry_after_seconds is not None or error.status == 503:
        headers["Retry-After"] = str(error.retry_after_seconds or _RETRY_AFTER_SECONDS)
    if error.code == "generation_failed":
        headers["x-should-retry"] = "false"  # the same request would fail again
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


def from_validation(error: ValidationError) -> InvalidRequestError:
    """Turn pydantic's first error into ours; the others would only repeat it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Clients do not know the names of union members and list indices.
    names = [str(part) for part in first["loc"] if isinstance(part, str)]
    names = [name for name in names if name.isidentifier() and name not in ("str", "int", "bool")]
    param = ".".join(names) or None
    message = first["msg"].removeprefix("Value error, ")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return InvalidRequestError(f"{param or 'body'}: {message}", param=param, code=code)


async def handle_coconut(request: Request, error: Exception) -> Response:
    """Handler of our own errors."""
    assert isinstance(error, CoconutError)
    count_error(request, error)
    return error_response(error)


async def handle_http(request: Request, error: Exception) -> Response:
    """Handler of the router's errors: unknown route, wrong method."""
    assert isinstance(error, HTTPException)
    ours = CoconutError(
        f"{request.method} {request.url.path}: {error.detail}",
        code=_HTTP_CODES.get(error.status_code, "http_error"),
    )
    ours.status, ours.error_type = error.status_code, "invalid_request_error"
    count_error(request, ours)
    response = error_response(ours)
    response.headers.update(error.headers or {})
    return response


async def handle_disconnect(request: Request, error: Exception) -> Response:
    """Handler of client disconnects: nobody reads this, and nothing went wrong."""
    del request, error
    return Response(status_code=499)


def unexpected_response(request: Request, error: Exception) -> JSONResponse:
    """Answer after a bug; only the log has the details."""
    logger.error("unhandled error on %s", request.url.path, exc_info=error)
    ours = CoconutError("internal error; the server's log has the details")
    count_error(request, ours)
    return error_response(ours)


def count_http(request: Request, method: str, status: int, seconds: float) -> None:
    """Record an HTTP request under the template of its route, never under its path."""
    metrics: Metrics | None = getattr(request.app.state, "metrics", None)
    if metrics is None:
        return
    route = request.scope.get("route")
    path = path_of(request)
    template = str(getattr(route, "path", path if path in ENDPOINTS else "other"))
    taken = getattr(route, "methods", None) or ("POST",)  # no route: refused before routing
    # Clients invent methods, which must not become series. HEAD is routed as GET.
    if template == "other" or ("GET" if method == "HEAD" else method) not in taken:
        method = template = "other"
    metrics.add(metrics.http_requests, 1, method, template, str(status))
    metrics.observe(metrics.http_seconds, seconds, method, template)


def path_of(request: Request) -> str:
    """The path as routes see it, without --root-path; by the router's own function."""
    return get_route_path(request.scope)


def count_error(request: Request, error: CoconutError) -> None:
    """Record an error response, if the model's metrics exist already."""
    metrics: Metrics | None = getattr(request.app.state, "metrics", None)
    if metrics is None:
        return
    endpoint = ENDPOINTS.get(path_of(request), "other")
    metrics.add(metrics.errors, 1, endpoint, error.code, str(error.status))
    is_loading = getattr(request.app.state, "service", None) is None
    reason = {
        "queue_full": "queue_full",
        "not_ready": "loading" if is_loading else "draining",
        "context_length_exceeded": "too_long",
    }.get(error.code, "invalid" if error.status in _REFUSALS else None)
    if endpoint != "other" and reason and not request.state.is_accepted:
        mode = request.state.reasoning_mode or UNKNOWN
        metrics.add(metrics.rejections, 1, reason)
        metrics.add(metrics.requests, 1, mode, endpoint, "rejected")
