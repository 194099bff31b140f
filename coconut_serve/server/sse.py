"""Server-sent events: frames, keep-alive comments, errors after the first byte."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from coconut_serve.errors import CoconutError
from coconut_serve.server.errors import error_body

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"


class _SlowClientError(Exception):
    """The client does not read what is sent."""


class EventStream(StreamingResponse):
    """Streams JSON texts as events and always closes what produces them.

    Args:
        events: JSON texts; an error in it becomes an event, then [DONE].
        close: Called once when the response is over, however it ended.
        on_slow: Called when the client has read nothing for `max_send_seconds` and is dropped.
        keep_alive_seconds: Silence after which a comment is sent, so that proxies do not cut a
            long latent phase.
    """

    def __init__(
        self,
        events: AsyncIterator[str],
        *,
        close: Callable[[], Awaitable[None]],
        on_slow: Callable[[], None],
        max_send_seconds: float,
        keep_alive_seconds: float,
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            _frames(events, keep_alive_seconds),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers},
        )
        self._close = close
        self._on_slow = on_slow
        self._max_send_seconds = max_send_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; a client that went away cancels this."""

        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(self._max_send_seconds):
                    await send(message)
            except TimeoutError:
                raise _SlowClientError from None

        try:
            await super().__call__(scope, receive, send_in_time)
        except _SlowClientError:
            logger.warning("dropping a client that reads nothing")
            self._on_slow()
        finally:
            # Shielded: a cancelled response must still free its sequences.
            await asyncio.shield(asyncio.ensure_future(self._close()))


async def _frames(events: AsyncIterator[str], keep_alive_seconds: float) -> AsyncIterator[bytes]:
    iterator = aiter(events)
    pending: asyncio.Future[str] | None = None
    try:
        while True:
            pending = asyncio.ensure_future(anext(iterator))
            while True:
                done, _ = await asyncio.wait({pending}, timeout=keep_alive_seconds)
                if done:
                    break
                yield _KEEP_ALIVE
            yield f"data: {pending.result()}\n\n".encode()
    except StopAsyncIteration:
        pass
    except CoconutError as error:
        yield f"data: {json.dumps(error_body(error))}\n\n".encode()
    except Exception:
        logger.exception("stream failed")
        failure = CoconutError("internal error; the server's log has the details")
        yield f"data: {json.dumps(error_body(failure))}\n\n".encode()
    finally:
        if pending is not None and not pending.done():
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
                await pending
    yield DONE
