"""Every error that crosses a layer.

CoconutError
 x RequestError                the client's fault; 4xx, names the field
   - InvalidRequestError       400
     - ContextLengthError      400, in OpenAI's words
   - AuthenticationError       401
   - NotFoundError             404
   - PayloadTooLargeError      413
   - QueueFullError            429, with Retry-After
 x EngineError                 the server's fault; 5xx
   - EngineDeadError           503
   - NotReadyError             503, starting or draining, with Retry-After
   - GenerationError           500, this one request failed
 x StartupError                the server refuses to start
"""


class CoconutError(Exception):
    """Base of all errors raised on purpose; users see the message."""

    status: int = 500
    error_type: str = "server_error"
    code: str = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_seconds = retry_after_seconds


class RequestError(CoconutError):
    """The request cannot be served as sent; `param` names the field."""

    status = 400
    error_type = "invalid_request_error"
    code = "invalid_value"


class InvalidRequestError(RequestError):
    """A field is wrong, out of range or not supported by this model."""


class ContextLengthError(InvalidRequestError):
    """Prompt, thinking and answer do not fit; clients match OpenAI's code and first words."""

    code = "context_length_exceeded"

    def __init__(self, limit: int, detail: str, *, param: str) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, {detail}", param=param
        )


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""

    status = 401
    error_type = "authentication_error"
    code = "invalid_api_key"


class NotFoundError(RequestError):
    """No such model or route."""

    status = 404
    error_type = "not_found_error"
    code = "not_found"


class PayloadTooLargeError(RequestError):
    """The body exceeds the server's limit."""

    status = 413
    code = "request_too_large"


class QueueFullError(RequestError):
    """The bounded queue is full; the client should retry later."""

    status = 429
    error_type = "rate_limit_error"
    code = "queue_full"


class EngineError(CoconutError):
    """The server failed; the request may be fine."""


class EngineDeadError(EngineError):
    """The engine stopped working; requests in flight end with this."""

    status = 503
    error_type = "service_unavailable_error"
    code = "engine_dead"


class NotReadyError(EngineError):
    """The server is starting or draining and takes no new work."""

    status = 503
    error_type = "service_unavailable_error"
    code = "not_ready"


class GenerationError(EngineError):
    """One request failed inside the engine; others go on."""

    code = "generation_failed"


class StartupError(CoconutError):
    """The server cannot start as configured; the text says what to change."""

    code = "startup_failed"


def require(condition: bool, param: str, message: str) -> None:
    """Raise InvalidRequestError naming `param` unless `condition` holds."""
    if not condition:
        raise InvalidRequestError(f"{param} {message}", param=param)
