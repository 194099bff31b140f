"""Server-sent events: frames, keep-alive comments, errors after the first byte."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from coconut_serve.errors import CoconutError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its JSON, and its name if the API names its events."""

    data: str
    name: str | None = None


class EventStream(StreamingResponse):
    """Streams events and always closes their source.

    Args:
        events: What is sent.
        close: Called once when the response is over, however it ended.
        on_slow: Called when the client has read nothing for `max_send_seconds` and is dropped.
        failure: Called with an error in `events`; makes the events that tell it.
        end: What is sent last; may be empty.
        keep_alive_seconds: Silence after which a comment is sent, so that proxies do not cut a
            long latent phase.
    """

    def __init__(
        self,
        events: AsyncIterator[Event],
        *,
        close: Callable[[], Awaitable[None]],
        on_slow: Callable[[], None],
        failure: Callable[[CoconutError], Iterable[Event]],
        end: bytes,
        max_send_seconds: float,
        keep_alive_seconds: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            _frames(events, failure, end),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers},
        )
        self._close = close
        self._on_slow = on_slow
        self._max_send_seconds = max_send_seconds
        self._keep_alive_seconds = keep_alive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; a client disconnect cancels this."""
        task = asyncio.current_task()
        assert task is not None
        line = _Line(send, self._max_send_seconds, self._keep_alive_seconds)
        watcher = asyncio.ensure_future(line.watch(task))
        try:
            await super().__call__(scope, receive, line.send)
        except asyncio.CancelledError:
            if not line.is_stuck:
                raise
            task.uncancel()
            logger.warning("dropping a client that reads nothing")
            self._on_slow()
        finally:
            watcher.cancel()
            # Shielded: a cancelled response must still free its sequences.
            await asyncio.shield(asyncio.ensure_future(self._close()))


class _Line:
    """The connection to one client, with one timer for all events, since most are on time.

    Args:
        send: ASGI's.
        max_send_seconds: Limit of a single send.
        keep_alive_seconds: Silence after which a comment is sent.
    """

    def __init__(self, send: Send, max_send_seconds: float, keep_alive_seconds: float) -> None:
        self.is_stuck = False  # the client does not read what is sent
        self._send = send
        self._max_send_seconds = max_send_seconds
        self._keep_alive_seconds = keep_alive_seconds
        self._is_open = False  # between headers and end
        self._sent = time.monotonic()  # end of the last send
        self._began: float | None = None  # start of the running send

    async def send(self, message: Message) -> None:
        self._began = time.monotonic()
        await self._send(message)
        self._sent, self._began = time.monotonic(), None
        self._is_open = message.get("more_body", message["type"] == "http.response.start")

    async def watch(self, task: "asyncio.Task[Any]") -> None:
        """Send keep-alives in silence; cancel the task when the client is stuck."""
        while not self.is_stuck:
            is_sending = self._began is not None
            since = self._sent if self._began is None else self._began
            due = since + (self._max_send_seconds if is_sending else self._keep_alive_seconds)
            wait = min(due - time.monotonic(), self._max_send_seconds)
            if wait > 0:
                await asyncio.sleep(wait)
            elif is_sending:
                self.is_stuck = True
            elif self._is_open:
                await self._bridge()
            else:
                await asyncio.sleep(self._keep_alive_seconds)
        task.cancel()

    async def _bridge(self) -> None:
        """Send a keep-alive; the task's own events do not wait for it."""
        message = {"type": "http.response.body", "body": _KEEP_ALIVE, "more_body": True}
        try:
            async with asyncio.timeout(self._max_send_seconds):
                await self._send(message)
        except TimeoutError:
            self.is_stuck = True
        self._sent = time.monotonic()


async def _frames(
    events: AsyncIterator[Event], failure: Callable[[CoconutError], Iterable[Event]], end: bytes
) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield _frame(event)
    except Exception as error:
        if not isinstance(error, CoconutError):
            logger.exception("stream failed")
            error = CoconutError("internal error; the server's log has the details")
        for event in failure(error):
            yield _frame(event)
    if end:
        yield end


def _frame(event: Event) -> bytes:
    name = f"event: {event.name}\n" if event.name else ""
    return f"{name}data: {_one_line(event.data)}\n\n".encode()


def _one_line(text: str) -> str:
    """Escape what JSON allows unescaped, but clients using str.splitlines() split at."""
    if text.isascii():
        return text
    for mark in ("\u0085", "\u2028", "\u2029"):
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text
