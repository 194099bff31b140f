"""The asyncio side of the native engine; core.py does the work, in a thread or process."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from coconut_serve.config import EngineConfig
from coconut_serve.engines.base import EngineInfo, OnStep, check_request
from coconut_serve.engines.native.hosts import Host, ProcessHost, ThreadHost
from coconut_serve.engines.native.messages import Abort, Add, Event
from coconut_serve.errors import EngineDeadError
from coconut_serve.types import Request, RequestOutput


class NativeEngine:
    """Continuous batching of all modes over one paged cache, on the CPU or one GPU.

    Args:
        config: Model and limits.
        modes: Reasoning modes to support.
        on_step: Called after each step with its statistics.
        has_own_process: Run the core in a process, so that steps and HTTP do not share a GIL;
            else in a thread.
        prepare: Called first in that process; must be picklable.
    """

    def __init__(
        self,
        config: EngineConfig,
        modes: tuple[str, ...],
        on_step: OnStep,
        *,
        has_own_process: bool = False,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self._on_step = on_step
        self._host: Host = (
            ProcessHost(config, modes, self._take, prepare)
            if has_own_process
            else ThreadHost(config, modes, self._take)
        )
        self._outputs: dict[str, asyncio.Queue[RequestOutput | Exception]] = {}
        self._num_restarts = 0
        self._death: EngineDeadError | None = None
        self._is_started = False

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._info = await asyncio.to_thread(self._host.start)
        self._is_started = True

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    @property
    def pid(self) -> int:
        """Id of the process that runs the core."""
        return self._host.pid

    async def check_health(self) -> None:
        self._require_alive()

    def _require_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death.message)
        if not self._is_started:
            raise EngineDeadError("the engine is not running")

    async def stop(self) -> None:
        await asyncio.to_thread(self._host.stop)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        self._require_alive()
        check_request(request, self._info)
        outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self._outputs[request.request_id] = outputs
        is_finished = False
        try:
            self._host.send(Add(request, time.monotonic()))
            while not is_finished:
                output = await outputs.get()
                is_finished = isinstance(output, Exception) or output.finish_reason is not None
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            del self._outputs[request.request_id]
            if not is_finished:
                self._host.send(Abort(request.request_id))

    def _take(self, event: Event) -> None:
        """Record a step's statistics, then pass its outputs to the event loop; from any thread."""
        for stats in event.stats:  # first, so that the metrics include every answer a client has
            self._on_step(stats)
        self._num_restarts = event.num_restarts
        if event.death is not None:
            self._death = event.death
        if (event.outputs or event.death) and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, event)

    def _deliver(self, event: Event) -> None:
        for request_id, output in event.outputs:
            if request_id in self._outputs:  # else the client is gone
                self._outputs[request_id].put_nowait(output)
        if event.death is not None:
            for channel in self._outputs.values():
                channel.put_nowait(event.death)
