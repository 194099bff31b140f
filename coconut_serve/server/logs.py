"""Log lines as text or JSON objects, with the id of their request."""

import logging
import os
from contextvars import ContextVar
from pathlib import Path

from pythonjsonlogger.json import JsonFormatter
from starlette.datastructures import State

from coconut_serve.config import LogFormat

VLLM_LOGS = Path(__file__).with_name("vllm_logs.json")  # a logging.config.dictConfig
# The state of the request that this task answers; its id may still change.
current: ContextVar[State | None] = ContextVar("current", default=None)


class RequestIdFilter(logging.Filter):
    """Adds request_id to each record that a request's own task logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        state = current.get()
        if state is not None and not hasattr(record, "request_id"):
            record.request_id = state.request_id
        return True


def json_formatter() -> JsonFormatter:
    """Make the formatter of JSON lines; VLLM_LOGS names it to vLLM."""
    return JsonFormatter(
        "{levelname}{name}{message}",
        style="{",
        timestamp="time",
        rename_fields={"levelname": "level", "name": "logger"},
        json_ensure_ascii=False,
    )


def prepare(log_format: LogFormat = "text") -> None:
    """Set up logging for a process; COCONUT_LOG_LEVEL is the level."""
    level = os.environ.get("COCONUT_LOG_LEVEL", "").upper()
    logging.basicConfig(
        level=level if level in logging.getLevelNamesMapping() else "INFO",
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if level != "DEBUG":  # HTTP clients log each request: a line per question of `eval`
        for client in ("httpx", "httpx2"):
            logging.getLogger(client).setLevel(logging.WARNING)
    set_format(log_format)


def set_format(log_format: LogFormat) -> None:
    """Set the format of the root logger's handlers, and of vLLM here and in its processes."""
    if log_format == "text":
        return
    for handler in logging.getLogger().handlers:
        handler.setFormatter(json_formatter())
        handler.addFilter(RequestIdFilter())
    os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(VLLM_LOGS))
