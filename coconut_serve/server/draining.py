"""The HTTP server: prints where it listens, waits for the model, drains before it exits."""

import asyncio
import logging
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from coconut_serve.config import ServeConfig, format_memory
from coconut_serve.server.example import example_request
from coconut_serve.server.listen import api_url
from coconut_serve.service.service import Service

logger = logging.getLogger(__name__)


class DrainingServer(uvicorn.Server):
    """Finishes running requests on SIGTERM or SIGINT; a second signal ends them."""

    def __init__(self, config: ServeConfig, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                ssl_certfile=config.ssl_certfile,
                ssl_keyfile=config.ssl_keyfile,
                ssl_ca_certs=config.ssl_ca_certs,
                ssl_cert_reqs=config.ssl_cert_reqs,
                log_config=None,
                log_level=logging.WARNING,  # "startup complete" would appear while the model loads
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=64 * 1024,
                timeout_graceful_shutdown=5,
            )
        )
        app.state.on_loaded = self.note_loaded
        self._drain_seconds = config.drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self.service: Service | None = None
        self.failure: Exception | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining; on a second signal stop at once."""
        if self._draining is not None or self.service is None:
            super().handle_exit(sig, frame)
            self.force_exit = self._draining is not None
            return
        logger.info("draining: no new requests, waiting for running ones")
        self.service.admission.is_draining = True
        self._draining = asyncio.get_running_loop().create_task(self._drain(self.service))

    async def _drain(self, service: Service) -> None:
        try:
            async with asyncio.timeout(self._drain_seconds):
                while service.admission.num_in_flight:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            service.admission.is_overdue = True
            await service.engine.stop()  # running requests end with an error, not a cut connection
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; the model may finish loading before or after."""
        await super().startup(sockets)
        self._announce()

    def note_loaded(self, outcome: Service | Exception) -> None:
        """Serve the loaded model, or stop because it failed to load."""
        if isinstance(outcome, Exception):
            self.failure = outcome
            self.should_exit = True
            return
        self.service = outcome
        self._announce()

    def _announce(self) -> None:
        """Print the address, once the server listens and the model is loaded."""
        if self.service is None or not self.started:
            return
        logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)
        info, config = self.service.engine.info, self.service.config
        url = api_url(config, self.servers[0].sockets[0])
        weights = f"{format_memory(info.weights_bytes)} for weights, " if info.weights_bytes else ""
        memory = f"memory {weights}up to {format_memory(info.kv_cache_bytes)} for the KV cache; "
        print(
            f"coconut-serve listens on {url} - "
            f"model {config.served_model_name} ({info.engine}, {info.device}, {info.dtype}), "
            f"modes {', '.join(self.service.model.modes)}; "
            f"{memory if info.kv_cache_bytes else ''}the KV cache holds "
            f"{info.kv_cache_positions} tokens, a request at most {info.max_model_len}\n"
            f"try: {example_request(self.service, url)}",
            flush=True,
        )
