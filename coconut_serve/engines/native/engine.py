"""The native engine: one thread that schedules and computes; asyncio on the outside."""

import asyncio
import logging
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from coconut_serve.checkpoint.manifest import load_manifest
from coconut_serve.checkpoint.weights import fingerprint
from coconut_serve.config import EngineConfig, parse_memory
from coconut_serve.engines.base import EngineInfo, OnStep, check_request
from coconut_serve.engines.native.block_pool import BlockPool
from coconut_serve.engines.native.model import PagedModel
from coconut_serve.engines.native.runner import Runner
from coconut_serve.engines.native.scheduler import Schedule, ScheduledRow, Scheduler
from coconut_serve.engines.native.sequence import Sequence
from coconut_serve.errors import EngineDeadError, StartupError
from coconut_serve.reasoning.adapters import REALIGN, AdapterBank
from coconut_serve.types import Request, RequestOutput, StepStats

logger = logging.getLogger(__name__)

_BLOCK_SIZE = 16
_MAX_RESTARTS = 3  # failures within the window below after which the engine stays dead
_RESTART_WINDOW_SECONDS = 60.0
_AUTO_CACHE_SHARE = "40%"  # of free memory, but on CPU no more than the requests can use


@dataclass(frozen=True, slots=True)
class _Add:
    sequence: Sequence
    outputs: "asyncio.Queue[RequestOutput | Exception]"


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str


class _Stop:
    pass


class NativeEngine:
    """Continuous batching of all modes over one paged cache, on the CPU or one GPU.

    Args:
        config: Model and limits.
        modes: Reasoning modes to support.
        on_step: Called after each step with its facts.
    """

    def __init__(self, config: EngineConfig, modes: tuple[str, ...], on_step: OnStep) -> None:
        self._config = config
        self._block_size = config.block_size or _BLOCK_SIZE
        self._modes = modes
        self._on_step = on_step
        self._inbox: queue.SimpleQueue[_Add | _Abort | _Stop] = queue.SimpleQueue()
        self._outputs: dict[str, asyncio.Queue[RequestOutput | Exception]] = {}
        self._failures: list[float] = []  # times
        self._num_restarts = 0
        self._death: EngineDeadError | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Load the model in a thread and start the engine thread."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._load)
        self._thread = threading.Thread(target=self._run, name="native-engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        """What the engine can do."""
        return self._info

    @property
    def num_restarts(self) -> int:
        """How often the engine recovered from a failed step."""
        return self._num_restarts

    async def check_health(self) -> None:
        """Raise EngineDeadError if the engine thread cannot work."""
        self._require_alive()

    def _require_alive(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death.message)
        if self._thread is None or not self._thread.is_alive():
            raise EngineDeadError("the engine is not running")

    async def stop(self) -> None:
        """End what runs and join the thread."""
        if self._thread is not None and self._thread.is_alive():
            self._inbox.put(_Stop())
            await asyncio.to_thread(self._thread.join)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Yield what each step adds to one sequence; closing aborts it."""
        self._require_alive()
        check_request(request, self._info)
        outputs: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        self._inbox.put(_Add(Sequence(request), outputs))
        self._require_alive()  # death is set before the inbox is emptied, so one of both sees it
        is_finished = False
        try:
            while not is_finished:
                output = await outputs.get()
                is_finished = isinstance(output, Exception) or output.finish_reason is not None
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            if not is_finished:
                self._inbox.put(_Abort(request.request_id))

    # ---- loading -------------------------------------------------------------------------

    def _load(self) -> None:
        config = self._config
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        if not config.show_progress:
            transformers_logging.disable_progress_bar()
        started = time.monotonic()
        self._num_threads = default_num_threads() if device.type == "cpu" else 1
        manifest = load_manifest(config.model)
        specs = manifest.adapter_specs if manifest else {}
        self._adapters = AdapterBank.load(config.model, specs, device)
        self._model = PagedModel.load(config.model, dtype=dtype, device=device)
        positions, max_model_len = self._size_cache()
        self._max_model_len = max_model_len
        self._num_blocks = positions // self._block_size + 1
        self._reset()
        self._info = EngineInfo(
            engine="native",
            vocab_size=self._model.vocab_size,
            max_model_len=max_model_len,
            kv_cache_positions=(self._num_blocks - 1) * self._block_size,
            block_size=self._block_size,
            hidden_size=self._model.hidden_size,
            modes=self._modes,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            adapters=(*self._adapters.names, REALIGN),
            fingerprint=fingerprint(config.model, dtype=str(dtype), device=device.type),
        )
        logger.info("model loaded in %.1f s", time.monotonic() - started)

    def _size_cache(self) -> tuple[int, int]:
        """Decide how many positions the cache holds and how long a sequence may be."""
        config, model = self._config, self._model
        size = self._block_size
        free = free_memory(model.device)
        wanted = config.max_model_len or model.max_model_len
        text = _AUTO_CACHE_SHARE if config.kv_cache_memory == "auto" else config.kv_cache_memory
        positions = parse_memory(text, free) // model.bytes_per_position // size * size
        if config.kv_cache_memory == "auto" and wanted and model.device.type == "cpu":
            positions = min(positions, -(-wanted // size) * size * config.max_num_seqs)
        if positions < size:
            raise StartupError(
                f"--kv-cache-memory {config.kv_cache_memory} holds no block of {size} positions "
                f"({model.bytes_per_position} bytes each)",
                param="--kv-cache-memory",
            )
        limit = model.max_model_len
        if config.max_model_len and limit and config.max_model_len > limit:
            raise StartupError(
                f"--max-model-len {config.max_model_len} is more than the model's {limit}",
                param="--max-model-len",
            )
        if config.max_model_len and config.max_model_len > positions:
            raise StartupError(
                f"--max-model-len {config.max_model_len} does not fit the KV cache of {positions} "
                "positions; raise --kv-cache-memory",
                param="--max-model-len",
            )
        return positions, min(wanted or positions, positions)

    def _reset(self) -> None:
        """Make an empty cache and scheduler; the old cache goes first."""
        self._runner: Runner | None = None
        config = self._config
        is_cpu = self._model.device.type == "cpu"
        self._scheduler = Scheduler(
            BlockPool(
                self._num_blocks, self._block_size, has_prefix_cache=config.enable_prefix_caching
            ),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens or (512 if is_cpu else 2048),
            max_model_len=self._max_model_len,
        )
        self._runner = Runner(
            self._model,
            self._modes,
            self._adapters,
            num_slots=config.max_num_seqs,
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            max_model_len=self._max_model_len,
        )

    # ---- the engine thread ---------------------------------------------------------------

    def _run(self) -> None:
        """Work until told to stop or failed too often; nothing waits for ever."""
        is_stopping = False
        torch.set_num_threads(self._num_threads)  # holds for the calling thread
        try:
            while not is_stopping:
                is_stopping = self._drain_inbox()
                if self._scheduler.has_work() and not is_stopping:
                    self._guarded_step()
        except EngineDeadError as error:
            self._death = error
        finally:
            self._death = self._death or EngineDeadError("the engine is shutting down")
            self._fail_all(self._death)
            self._drain_dead(self._death)

    def _drain_inbox(self) -> bool:
        """Take all messages, waiting for one when idle; True to stop."""
        while True:
            try:
                message = self._inbox.get(block=not self._scheduler.has_work())
            except queue.Empty:
                return False
            match message:
                case _Add(sequence, outputs):
                    self._outputs[sequence.request.request_id] = outputs
                    self._scheduler.add(sequence)
                case _Abort(request_id):
                    self._outputs.pop(request_id, None)
                    if self._scheduler.abort(request_id) and not self._scheduler.has_work():
                        self._report_idle()
                case _Stop():
                    return True

    def _drain_dead(self, error: EngineDeadError) -> None:
        """Answer requests that came while the engine died."""
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, _Add):
                self._post([(message.outputs, error)])

    def _guarded_step(self) -> None:
        """Run a step; if it fails, end all sequences and start afresh."""
        try:
            self._one_step()
        except Exception as failure:
            logger.exception("engine step failed")
            reason = str(failure)
        else:
            return
        now = time.monotonic()
        self._failures = [t for t in self._failures if now - t < _RESTART_WINDOW_SECONDS]
        self._failures.append(now)
        if len(self._failures) > _MAX_RESTARTS:
            raise EngineDeadError(f"the engine failed too often and stays down: {reason}")
        try:
            self._reset()
        except Exception as failure:
            raise EngineDeadError(f"the engine could not restart: {failure}") from failure
        self._num_restarts += 1
        self._report_idle()
        self._fail_all(EngineDeadError(f"the engine failed: {reason}", retry_after_seconds=1))

    def _one_step(self) -> None:
        """Schedule, run, follow, send: the life of a step."""
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        assert self._runner is not None
        results = self._runner.run(schedule)
        rows = _count_rows(schedule)
        outputs = self._scheduler.update(schedule, results)
        # Report first: who sees an answer finds it in the metrics.
        self._report(time.perf_counter() - started, rows, schedule)
        if not self._scheduler.has_work():
            self._report_idle()
        self._post([(self._outputs[output.request_id], output) for output in outputs])
        for output in outputs:
            if output.finish_reason is not None:
                del self._outputs[output.request_id]

    def _report_idle(self) -> None:
        """Check the books while nothing runs and zero the gauges."""
        self._scheduler.check_integrity()
        self._report(0.0, {}, Schedule())

    def _report(self, seconds: float, rows: dict[tuple[str, str], int], schedule: Schedule) -> None:
        """Hand the facts of a step to whoever counts."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        running, waiting = scheduler.count_by_mode()
        num_prefill = sum(r.end - r.start for r in schedule.rows if r.end - r.start > 1)
        stats = StepStats(
            seconds=seconds,
            num_rows=rows,
            num_prefill_positions=num_prefill,
            num_running=running,
            num_waiting=waiting,
            num_preemptions=scheduler.num_preemptions,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_used_blocks=pool.num_used,
            num_prefix_queries=pool.num_queries,
            num_prefix_hits=pool.num_hits,
            wait_reason=scheduler.wait_reason,
        )
        scheduler.num_preemptions = pool.num_queries = pool.num_hits = 0
        self._on_step(stats)

    def _post(
        self,
        posts: list[tuple["asyncio.Queue[RequestOutput | Exception]", RequestOutput | Exception]],
    ) -> None:
        """Hand outputs to the event loop: one call a step."""

        def deliver() -> None:
            for channel, item in posts:
                channel.put_nowait(item)

        if posts and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)

    def _fail_all(self, error: EngineDeadError) -> None:
        self._post([(channel, error) for channel in self._outputs.values()])
        self._outputs.clear()


def _count_rows(schedule: Schedule) -> dict[tuple[str, str], int]:
    """Count rows by mode and phase: prefill, a mode that is fed a vector, or decode."""

    def phase(row: ScheduledRow) -> str:
        if not row.is_decode:
            return "prefill"
        is_vector = row.sequence.inputs[-1] is None
        return row.sequence.request.reasoning.mode if is_vector else "decode"

    return dict(Counter((r.sequence.request.reasoning.mode, phase(r)) for r in schedule.rows))


def resolve_device(name: str) -> torch.device:
    """Turn the flag into a device.

    Raises:
        StartupError: CUDA is asked for and not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch sees no CUDA device", param="--device")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn the flag into a dtype; auto is bfloat16 where the hardware computes in it."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def default_num_threads() -> int:
    """Threads of the CPU engine: OMP_NUM_THREADS, else all usable cores but one.

    The event loop needs a core too: where it shares one with a compute thread, the others spin at
    the barrier and a step can take many times longer.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, len(os.sched_getaffinity(0)) - 1)


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free on the device now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    with open("/proc/meminfo", encoding="ascii") as lines:
        available = next(line for line in lines if line.startswith("MemAvailable"))
    return min(int(available.split()[1]) * 1024, _free_in_cgroup())


def _free_in_cgroup() -> int:
    """What the container's limit leaves (cgroup v2); very much without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return sys.maxsize
    return sys.maxsize if limit == "max" else max(0, int(limit) - used)
