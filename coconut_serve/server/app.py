"""The application: routes, errors, and a model that loads while /health already answers."""

import asyncio
import contextlib
import importlib.metadata
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

import coconut_serve
from coconut_serve.config import ServeConfig
from coconut_serve.errors import CoconutError
from coconut_serve.metrics import Metrics
from coconut_serve.server import chat, completions, openapi, ops, pages, responses
from coconut_serve.server.errors import handle_coconut, handle_disconnect, handle_http
from coconut_serve.server.middleware import RequestMiddleware
from coconut_serve.server.stats import log_stats
from coconut_serve.service.service import Service

logger = logging.getLogger(__name__)

_EXPOSED_HEADERS = (  # to scripts of web pages, beside those that are always exposed
    "openai-processing-ms", "Retry-After", "X-Coconut-Ignored-Params", "X-Reasoning-Mode",
    "x-request-id", "x-should-retry",
)  # fmt: skip

Load = Callable[[Metrics], Awaitable[Service]]


def create_app(config: ServeConfig, *, load: Load, metrics: Metrics) -> FastAPI:
    """Build the application.

    Args:
        config: The HTTP side's settings.
        load: Starts an engine and builds the service; runs once, in the background.
        metrics: Where everything is recorded.

    Returns:
        The application. Its `state.on_loaded` is called with the service, or with the exception
        that kept it from loading; set it before the lifespan starts.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(_load(app)), asyncio.create_task(log_stats(metrics))]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        service: Service | None = app.state.service
        if service is not None:
            await service.engine.stop()

    async def _load(app: FastAPI) -> None:
        started = time.monotonic()
        try:
            app.state.service = await load(metrics)
        except Exception as error:
            logger.debug("loading failed", exc_info=error)
            app.state.on_loaded(error)
            return
        metrics.set(metrics.load_seconds, time.monotonic() - started)
        metrics.set(metrics.config_info, 1, *_limits(app.state.service))
        app.state.on_loaded(app.state.service)

    app = FastAPI(
        title="coconut-serve",
        version=coconut_serve.__version__,
        summary="OpenAI-compatible inference server for latent reasoning",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from a CDN; ours is in pages.py
        redoc_url=None,
    )
    app.openapi = lambda: openapi.build(app)  # type: ignore[method-assign]  # FastAPI's own way
    app.state.service = None
    app.state.metrics = metrics
    app.state.on_loaded = lambda _: None
    metrics.set(metrics.build_info, 1, coconut_serve.__version__, config.commit, _torch_version())
    for module in (chat, completions, responses, ops):
        app.include_router(module.router)
    if not config.disable_ui:
        app.include_router(pages.make_router())
    app.add_exception_handler(CoconutError, handle_coconut)
    app.add_exception_handler(HTTPException, handle_http)
    app.add_exception_handler(ClientDisconnect, handle_disconnect)
    _add_middleware(app, config)
    return app


def _add_middleware(app: FastAPI, config: ServeConfig) -> None:
    keys, root = config.api_keys, config.root_path
    opened = frozenset() if config.disable_ui else pages.PATHS
    app.add_middleware(RequestMiddleware, api_keys=keys, root_path=root, open_paths=opened)
    if config.allowed_origins:
        app.add_middleware(  # around the one above: preflights carry no key
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=_EXPOSED_HEADERS,
        )


def _limits(service: Service) -> tuple[str, ...]:
    """Values of metrics.LIMITS."""
    info, config = service.engine.info, service.config
    limits = (info.max_model_len, config.max_num_seqs, config.max_queue, info.kv_cache_positions)
    return (*map(str, limits), info.dtype, info.device)


def _torch_version() -> str:
    """The installed version, without loading torch for engines that need none."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "none"
