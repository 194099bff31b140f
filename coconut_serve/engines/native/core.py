"""The native engine's worker: loads, then schedules, computes and reports until stopped.

It has no event loop: messages come in through a queue, events go out through a callback. hosts.py
runs it in a thread or in a process of its own.
"""

import logging
import queue
import time
from collections import Counter
from collections.abc import Callable

import torch
from transformers.utils import logging as transformers_logging

from coconut_serve.checkpoint.fit import check_weights
from coconut_serve.checkpoint.manifest import load_manifest
from coconut_serve.checkpoint.stages import stage
from coconut_serve.checkpoint.weights import fingerprint
from coconut_serve.config import EngineConfig, format_memory, parse_memory
from coconut_serve.engines.base import EngineInfo
from coconut_serve.engines.native.block_pool import BlockPool
from coconut_serve.engines.native.device import (
    default_num_threads,
    free_memory,
    resolve_device,
    resolve_dtype,
)
from coconut_serve.engines.native.messages import Abort, Add, Event, Message, Stop
from coconut_serve.engines.native.model import PagedModel, max_positions, read_config
from coconut_serve.engines.native.runner import Runner
from coconut_serve.engines.native.scheduler import Schedule, ScheduledRow, Scheduler
from coconut_serve.engines.native.sequence import Sequence
from coconut_serve.engines.restarts import RestartBudget
from coconut_serve.errors import EngineDeadError, StartupError
from coconut_serve.reasoning.adapters import REALIGN, AdapterBank
from coconut_serve.reasoning.registry import Feeds, properties_of
from coconut_serve.types import RequestOutput, StepStats

logger = logging.getLogger(__name__)

_BLOCK_SIZE = 16
_RESTART_WINDOW_SECONDS = 60.0
_AUTO_CACHE_SHARE = "40%"  # of free memory
_AUTO_CPU_CACHE_BYTES = 2 * 2**30  # at most, and no more than the requests can use


class EngineCore:
    """Loads the model, then runs steps and answers messages.

    Args:
        config: Model and limits.
        modes: Reasoning modes to support.
        inbox: Messages to handle.
        send: Called with each event, from the thread of `run`.
    """

    def __init__(
        self,
        config: EngineConfig,
        modes: tuple[str, ...],
        inbox: "queue.SimpleQueue[Message]",
        send: Callable[[Event], None],
    ) -> None:
        self._config = config
        self._block_size = config.block_size or _BLOCK_SIZE
        self._modes = modes
        self._inbox = inbox
        self._send = send
        self._stats: list[StepStats] = []  # since the last event
        self._in_flight: set[str] = set()  # request ids
        self._restarts = RestartBudget(_RESTART_WINDOW_SECONDS)
        self._num_restarts = 0

    # ---- loading -------------------------------------------------------------------------

    def load(self) -> EngineInfo:
        """Load the model and allocate the cache.

        Raises:
            StartupError: It cannot run as configured.
        """
        config = self._config
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        if not config.show_progress:
            transformers_logging.disable_progress_bar()
        self._num_threads = default_num_threads() if device.type == "cpu" else 1
        show = config.show_progress
        with stage("checking the model's files", show_progress=show):
            self._check_directory(device)
        self._model = PagedModel.load(config.model, dtype=dtype, device=device, show_progress=show)
        with stage("making the KV cache", show_progress=show):
            positions, self._max_model_len = self._size_cache()
            self._num_blocks = positions // self._block_size + 1
            self._reset()
        return EngineInfo(
            engine="native",
            vocab_size=self._model.vocab_size,
            max_model_len=self._max_model_len,
            kv_cache_positions=(self._num_blocks - 1) * self._block_size,
            kv_cache_bytes=positions * self._model.bytes_per_position,
            weights_bytes=self._model.weights_bytes,
            block_size=self._block_size,
            hidden_size=self._model.hidden_size,
            modes=self._modes,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            adapters=(*self._adapters.names, REALIGN),
            fingerprint=fingerprint(config.model, dtype=str(dtype), device=device.type),
        )

    def _check_directory(self, device: torch.device) -> None:
        """Reject what cannot work before reading weights, which may take minutes."""
        config = self._config
        settings = read_config(config.model).get_text_config()
        limit = max_positions(settings)
        if config.max_model_len and limit and config.max_model_len > limit:
            raise StartupError(
                f"--max-model-len {config.max_model_len} is more than the model's {limit}",
                param="--max-model-len",
            )
        manifest = load_manifest(config.model)
        specs = manifest.adapter_specs if manifest else {}
        self._adapters = AdapterBank.load(config.model, specs, device)
        self._adapters.check(settings.hidden_size)
        check_weights(config.model)

    def _size_cache(self) -> tuple[int, int]:
        """Return how many positions the cache holds, and how many a sequence may have."""
        config, model = self._config, self._model
        size = self._block_size
        free = free_memory(model.device)
        wanted = config.max_model_len or model.max_model_len
        is_auto = config.kv_cache_memory == "auto"
        num_bytes = parse_memory(_AUTO_CACHE_SHARE if is_auto else config.kv_cache_memory, free)
        if is_auto and model.device.type == "cpu":
            num_bytes = min(num_bytes, _AUTO_CPU_CACHE_BYTES)
        positions = num_bytes // model.bytes_per_position // size * size
        if is_auto and wanted and model.device.type == "cpu":
            positions = min(positions, -(-wanted // size) * size * config.max_num_seqs)
        if positions < size:
            raise StartupError(
                f"--kv-cache-memory {config.kv_cache_memory} holds no block of {size} positions "
                f"({model.bytes_per_position} bytes each)",
                param="--kv-cache-memory",
            )
        if config.max_model_len and config.max_model_len > positions:
            raise StartupError(
                f"--max-model-len {config.max_model_len} does not fit the KV cache of {positions} "
                "positions; raise --kv-cache-memory",
                param="--max-model-len",
            )
        if wanted and wanted > positions:
            logger.warning(
                "a request may have %d positions, not the model's %d: the KV cache of %s holds no "
                "more; raise --kv-cache-memory",
                positions,
                wanted,
                format_memory(num_bytes),
            )
        return positions, min(wanted or positions, positions)

    def _reset(self) -> None:
        """Make an empty cache and scheduler, after freeing the old cache."""
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
            long_after=self._model.long_after,
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

    # ---- working -------------------------------------------------------------------------

    def run(self) -> None:
        """Run until stopped or failed too often; the last event ends all sequences."""
        is_stopping = False
        death = EngineDeadError("the engine is shutting down")
        torch.set_num_threads(self._num_threads)  # holds for the calling thread
        try:
            while not is_stopping:
                is_stopping = self._drain_inbox()
                if self._scheduler.has_work() and not is_stopping:
                    self._guarded_step()
        except EngineDeadError as error:
            death = error
        finally:
            self._post([], death)

    def _drain_inbox(self) -> bool:
        """Handle all messages, waiting for one when idle; return True to stop."""
        while True:
            try:
                message = self._inbox.get(block=not self._scheduler.has_work())
            except queue.Empty:
                return False
            match message:
                case Add(request, arrival_seconds):
                    self._in_flight.add(request.request_id)
                    self._scheduler.add(Sequence(request, arrival_seconds))
                case Abort(request_id):
                    self._in_flight.discard(request_id)
                    if self._scheduler.abort(request_id) and not self._scheduler.has_work():
                        self._report_idle()
                        self._post([])
                case Stop():
                    return True

    def _guarded_step(self) -> None:
        """Run a step; if it fails, end all sequences and reset."""
        try:
            self._one_step()
        except Exception as failure:
            logger.exception("engine step failed")
            reason = str(failure)
        else:
            return
        if not self._restarts.allows_another():
            raise EngineDeadError(f"the engine failed too often and stays down: {reason}")
        try:
            self._reset()
        except Exception as failure:
            raise EngineDeadError(f"the engine could not restart: {failure}") from failure
        self._num_restarts += 1
        self._report_idle()
        error = EngineDeadError(f"the engine failed: {reason}", retry_after_seconds=1)
        self._post([(request_id, error) for request_id in self._in_flight])
        self._in_flight.clear()

    def _one_step(self) -> None:
        """Schedule, run, update, send: the life of a step."""
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        assert self._runner is not None
        results = self._runner.run(schedule)
        rows = _count_rows(schedule)
        outputs = self._scheduler.update(schedule, results)
        self._report(time.perf_counter() - started, rows, schedule)
        if not self._scheduler.has_work():
            self._report_idle()
        self._in_flight -= {o.request_id for o in outputs if o.finish_reason is not None}
        self._post([(output.request_id, output) for output in outputs])

    def _report_idle(self) -> None:
        """Check blocks and slots while nothing runs, and zero the gauges."""
        self._scheduler.check_integrity()
        self._report(0.0, {}, Schedule())

    def _report(self, seconds: float, rows: dict[tuple[str, str], int], schedule: Schedule) -> None:
        """Record the statistics of a step for the next event."""
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
        self._stats.append(stats)

    def _post(
        self,
        outputs: list[tuple[str, RequestOutput | EngineDeadError]],
        death: EngineDeadError | None = None,
    ) -> None:
        """Send everything since the last event: one event a step."""
        stats, self._stats = self._stats, []
        self._send(Event(stats, outputs, self._num_restarts, death))


def _count_rows(schedule: Schedule) -> dict[tuple[str, str], int]:
    """Count rows by mode and phase: prefill, or what they are fed."""

    def phase(row: ScheduledRow) -> str:
        if not row.is_decode:
            return "prefill"
        is_vector = row.sequence.inputs[-1] is None
        feeds = properties_of(row.sequence.request.reasoning.mode).feeds
        return feeds.value if is_vector else Feeds.TOKEN.value

    return dict(Counter((r.sequence.request.reasoning.mode, phase(r)) for r in schedule.rows))
