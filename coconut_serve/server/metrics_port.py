"""/metrics on a port of its own, where scrapers need no key."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Route

from coconut_serve.errors import CoconutError
from coconut_serve.server.errors import handle_coconut
from coconut_serve.server.listen import listen, url_of
from coconut_serve.server.ops import metrics

logger = logging.getLogger(__name__)


def add_metrics_port(app: FastAPI, *, host: str, port: int) -> None:
    """Serve the application's metrics on another port during its lifespan.

    Raises:
        StartupError: The port is not available.
    """
    listener = listen(host, port, "--metrics-port")
    logger.info("metrics on %s/metrics", url_of(host, listener.getsockname()[1]))
    lifespan = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def both(app: FastAPI) -> AsyncIterator[None]:
        async with lifespan(app), _serving(app, listener):
            yield

    app.router.lifespan_context = both


@contextlib.asynccontextmanager
async def _serving(app: FastAPI, listener: socket.socket) -> AsyncIterator[None]:
    side = Starlette(routes=[Route("/metrics", metrics)])
    side.state = app.state
    side.add_exception_handler(CoconutError, handle_coconut)
    config = uvicorn.Config(
        side, log_config=None, access_log=False, server_header=False, lifespan="off"
    )
    server = _SideServer(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving


class _SideServer(uvicorn.Server):
    """Leaves signals to the main server."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
