"""Log lines: text, or one JSON object each, with the id of the request they belong to."""

import logging
from contextvars import ContextVar

from pythonjsonlogger.json import JsonFormatter
from starlette.datastructures import State

from coconut_serve.config import LogFormat

# The state of the request that this task answers; its id may still change.
current: ContextVar[State | None] = ContextVar("current", default=None)


class RequestIdFilter(logging.Filter):
    """Gives every record of a request's own task its request_id."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Pass all records on."""
        state = current.get()
        if state is not None and not hasattr(record, "request_id"):
            record.request_id = state.request_id
        return True


def set_format(log_format: LogFormat) -> None:
    """Choose how the root logger's handlers write."""
    if log_format == "text":
        return
    formatter = JsonFormatter(
        "{levelname}{name}{message}",
        style="{",
        timestamp="time",
        rename_fields={"levelname": "level", "name": "logger"},
        json_ensure_ascii=False,
    )
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
        handler.addFilter(RequestIdFilter())
