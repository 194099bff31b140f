"""What both generation endpoints share: run a generation, answer whole or as a stream."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from coconut_serve.errors import CoconutError
from coconut_serve.server.errors import count_error
from coconut_serve.server.parse import generate_call, read_reasoning
from coconut_serve.server.render import Renderer
from coconut_serve.server.schemas import GenerationBody
from coconut_serve.server.sse import DONE, Event, EventStream
from coconut_serve.server.state import ignored_header
from coconut_serve.service.ask import GenerateCall
from coconut_serve.service.generation import Generation
from coconut_serve.service.select import run_whole
from coconut_serve.service.service import Service

T = TypeVar("T")


async def _whole(renderer: Renderer) -> str:
    """Run to the end and return the answer in one piece."""
    choices = await run_whole(renderer.generation)
    return renderer.whole(choices)


async def _stream(renderer: Renderer) -> AsyncIterator[Event]:
    """Run and yield the answer as events, usage last if requested."""
    for event in renderer.opening():
        yield event
    async with renderer.generation as deltas:
        async for delta in deltas:
            for event in renderer.events(delta):
                yield event
    for event in renderer.closing():
        yield event


def read_ask(request: Request, body: GenerationBody, service: Service, **own: Any) -> GenerateCall:
    """Build the call of an HTTP request; `own` are the endpoint's arguments of `generate_call`."""
    if body.request_id is not None:
        request.state.request_id = body.request_id  # for the header and the log too
    asked = read_reasoning(body, service.config, request.headers.get("x-reasoning-mode"))
    request.state.reasoning_mode = asked.mode  # for the metrics, if it is rejected
    return generate_call(body, asked, arrival=request.state.arrival, **own)


async def respond(request: Request, renderer: Renderer, ignored: list[str]) -> Response:
    """Run the renderer's generation and send it the way the client asked."""
    service, generation = renderer.service, renderer.generation
    request.state.is_accepted = True  # an error from here on ends a sequence
    headers = {"X-Reasoning-Mode": generation.prepared.mode, **ignored_header(service, ignored)}

    def fail(error: CoconutError) -> Iterator[Event]:
        count_error(request, error)
        return renderer.failure(error)

    if renderer.body.stream:
        return EventStream(
            _stream(renderer),
            close=generation.close,
            on_slow=lambda: service.metrics.add(service.metrics.slow_drops, 1),
            failure=fail,
            end=DONE if renderer.has_end_mark else b"",
            max_send_seconds=service.config.max_send_seconds,
            keep_alive_seconds=service.config.keep_alive_seconds,
            headers=headers,
        )
    text = await _until_disconnect(request, _whole(renderer), generation)
    return Response(text, media_type="application/json", headers=headers)


async def _until_disconnect(
    request: Request, work: Coroutine[None, None, T], generation: Generation
) -> T:
    """Run `work`; if the client disconnects, cancel it and wait for that.

    Raises:
        ClientDisconnect: The client went away; there is nobody to answer.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, listener = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        listener.cancel()
        task.cancel()
        await asyncio.gather(listener, task, return_exceptions=True)
        await generation.close()  # `work` may never have started it
