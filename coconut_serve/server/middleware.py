"""Around every request: its id, its API key, how long it took.

Plain ASGI, so that the route itself sees a client disconnect.
"""

import hashlib
import hmac
import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coconut_serve.errors import AuthenticationError, CoconutError
from coconut_serve.server.errors import (
    ENDPOINTS,
    count_error,
    count_http,
    error_response,
    path_of,
    unexpected_response,
)
from coconut_serve.server.logs import current
from coconut_serve.server.parse import request_id

logger = logging.getLogger("coconut_serve.access")

_OPEN_PATHS = frozenset({"/health", "/ready"})  # probes carry no key
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})


class RequestMiddleware:
    """Sets x-request-id and openai-processing-ms, checks the key, logs one line.

    Every key is compared, as a hash and in constant time. Routes match whether or not a proxy
    has stripped `root_path`.

    Args:
        app: What the requests are for.
        api_keys: Of which a request must carry one; none: no request must.
        root_path: What a proxy in front puts before our paths.
        open_paths: Which need no key, beside those of probes.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: tuple[str, ...],
        root_path: str = "",
        open_paths: frozenset[str] = frozenset(),
    ) -> None:
        self._app = app
        self._root_path = root_path
        self._open_paths = _OPEN_PATHS | open_paths
        self._keys = [_digest(key.encode()) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        method = scope["method"]
        # HEAD is served as GET; uvicorn leaves the body out.
        scope = {**scope, "root_path": self._root_path or scope.get("root_path", "")}
        scope["method"] = "GET" if method == "HEAD" else method
        request = Request(scope)
        started = time.perf_counter()
        request.state.request_id = request_id(request)
        request.state.arrival = time.monotonic()
        request.state.is_accepted, request.state.reasoning_mode = False, None
        current.set(request.state)
        status = 0  # until an answer begins

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request.state.request_id
                elapsed_ms = (time.perf_counter() - started) * 1e3
                headers["openai-processing-ms"] = str(round(elapsed_ms))
            await send(message)

        try:
            error = self._refusal(request)
            if error is not None:
                count_error(request, error)
                await error_response(error)(scope, receive, send_with_headers)
            else:
                await self._app(scope, receive, send_with_headers)
        except Exception as failure:
            if status:
                raise
            # Here and not further out, so that the answer gets its headers, CORS included.
            await unexpected_response(request, failure)(scope, receive, send_with_headers)
        finally:
            status, seconds = status or 500, time.perf_counter() - started
            path = scope["raw_path"].decode("ascii", "replace")  # not decoded: no line breaks
            # Under overload the stats line, every ten seconds, counts the rejections.
            is_quiet = path_of(request) in _QUIET_PATHS or status == 429
            level = logging.DEBUG if is_quiet else logging.INFO
            count_http(request, method, status, seconds)
            logger.log(
                level,
                "%s %s %d %.3fs request_id=%s",
                method,
                path,
                status,
                seconds,
                request.state.request_id,
                extra={"method": method, "path": path, "status": status, "seconds": seconds},
            )

    def _refusal(self, request: Request) -> CoconutError | None:
        """Return why to reject the request, before doing any work for it.

        Under overload most requests are rejected; each must cost the engine next to nothing.
        """
        path = path_of(request)
        if self._keys and path not in self._open_paths and not self._knows(request):
            return AuthenticationError("missing or wrong API key (Authorization: Bearer ...)")
        service = getattr(request.app.state, "service", None)
        if service is None or path not in ENDPOINTS or request.method != "POST":
            return None
        try:
            service.admission.check(1)
        except CoconutError as error:
            return error
        return None

    def _knows(self, request: Request) -> bool:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode())
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
