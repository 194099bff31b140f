"""The vLLM engine: our protocol over AsyncLLM in this process, its workers with our hooks."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coconut_serve.checkpoint.files import one_line
from coconut_serve.checkpoint.fit import check_weights
from coconut_serve.checkpoint.stages import stage
from coconut_serve.checkpoint.weights import fingerprint
from coconut_serve.config import EngineConfig
from coconut_serve.engines.base import EngineInfo, OnStep, check_request
from coconut_serve.engines.restarts import RestartBudget
from coconut_serve.engines.vllm import plugin
from coconut_serve.engines.vllm.options import build_engine_args, check_adapter, check_device
from coconut_serve.engines.vllm.params import counts_by_itself, to_extra_args, worker_params
from coconut_serve.engines.vllm.reader import OutputReader
from coconut_serve.engines.vllm.stats import StepObserver
from coconut_serve.errors import (
    CoconutError,
    EngineDeadError,
    GenerationError,
    InvalidRequestError,
    StartupError,
    require,
)
from coconut_serve.reasoning.registry import Feeds, properties_of
from coconut_serve.types import Request, RequestOutput

logger = logging.getLogger(__name__)

_RESTART_WINDOW_SECONDS = 600.0
_MAX_STOPS = 128  # vLLM's limit for a request with min_tokens
_MAX_BIASES = 1024  # vLLM's limit


@dataclass(slots=True)
class _Life:
    """One AsyncLLM, from start to death."""

    llm: Any
    observer: StepObserver
    death: EngineDeadError | None = None


class VllmEngine:
    """All modes inside vLLM: its scheduler, kernels, parallelism, quantisation and LoRA.

    Args:
        config: Model and limits.
        modes: Reasoning modes to support.
        on_step: Called after each step with its statistics.
        flags: vLLM's own command-line flags.
    """

    def __init__(
        self,
        config: EngineConfig,
        modes: tuple[str, ...],
        on_step: OnStep,
        flags: tuple[str, ...] = (),
    ) -> None:
        self._config = config
        self._modes = modes
        self._on_step = on_step
        self._flags = flags
        self._life: _Life | None = None
        self._death: EngineDeadError | None = EngineDeadError("the engine is not running")
        self._restarts = RestartBudget(_RESTART_WINDOW_SECONDS)
        self._num_restarts = 0
        self._revival: asyncio.Task[None] | None = None
        self._info: EngineInfo | None = None

    @property
    def info(self) -> EngineInfo:
        assert self._info is not None, "the engine has not started"
        return self._info

    @property
    def num_restarts(self) -> int:
        return self._num_restarts

    async def start(self) -> None:
        """Start vLLM and its workers and see that the hooks are live in each.

        Raises:
            StartupError: vLLM is missing, of another version, or cannot run this.
        """
        plugin.check_version()
        self._life = await self._begin()
        self._death = None

    async def _begin(self) -> _Life:
        _set_environment()
        show = self._config.show_progress
        try:
            with stage("checking the model's files", show_progress=show):
                await asyncio.to_thread(self._check_weights)
            with stage("starting vLLM", show_progress=show):
                return await self._launch()
        except CoconutError:
            raise
        except Exception as error:
            logger.debug("vLLM did not start", exc_info=True)
            raise StartupError(f"vLLM did not start: {one_line(error)}") from error

    def _check_weights(self) -> None:
        """Reject wrong weights by name: vLLM runs even if some are missing."""
        if not any(flag.startswith(("--load-format", "--load_format")) for flag in self._flags):
            check_weights(self._config.model)

    async def _launch(self) -> _Life:
        from vllm.v1.engine.async_llm import AsyncLLM

        observer = StepObserver(self._on_step)
        self._adapter = check_adapter(self._flags)
        args = build_engine_args(self._config, self._flags)

        def create() -> Any:
            plugin.install()
            check_device(self._config.device)
            from coconut_serve.engines.vllm.hooks import check_config

            config = args.create_engine_config()
            check_config(config)  # here, where the user sees the reason; workers check again
            return AsyncLLM.from_vllm_config(config, stat_loggers=[lambda *_: observer])

        llm = await asyncio.to_thread(create)
        try:
            status = await self._check_workers(llm)
        except BaseException:
            await asyncio.to_thread(llm.shutdown)
            raise
        cache = llm.vllm_config.cache_config
        observer.num_blocks = cache.num_gpu_blocks or 0
        observer.num_engines = llm.vllm_config.parallel_config.data_parallel_size
        self._info = _describe(llm.vllm_config, self._modes, status, self._adapter)
        return _Life(llm, observer)

    async def _check_workers(self, llm: Any) -> dict[str, Any]:
        """Check that the hooks are live in every worker; return their adapters and memory."""
        whole: dict[str, Any] = {"adapters": (), "weights_bytes": 0, "kv_cache_bytes": 0}
        for rank, status in enumerate(await llm.collective_rpc("coconut_status")):
            logger.info("vLLM worker %s: %s", rank, status)
            if not status["is_live"]:
                raise StartupError(
                    f"the hooks are not live in vLLM worker {rank} ({status}); is coconut-serve "
                    "installed there, and is it in VLLM_PLUGINS if that is set?"
                )
            whole["adapters"] = tuple(status["adapters"])
            whole["weights_bytes"] += status["weights_bytes"]
            whole["kv_cache_bytes"] += status["kv_cache_bytes"]
        return whole

    async def check_health(self) -> None:
        life = self._life
        if self._death is None and life is not None and life.llm.errored:
            self._note_death(life)
        if self._death is not None:
            raise EngineDeadError(
                self._death.message, retry_after_seconds=self._death.retry_after_seconds
            )

    def _note_death(self, life: _Life) -> None:
        """Reject new requests and restart vLLM, unless it dies too often."""
        if self._life is not life or self._death is not None:
            return
        if not self._restarts.allows_another():
            self._death = EngineDeadError("vLLM died too often and stays down")
            return
        self._death = EngineDeadError("vLLM died and is being started anew", retry_after_seconds=30)
        self._revival = asyncio.get_running_loop().create_task(self._revive(life))

    async def _revive(self, life: _Life) -> None:
        logger.error("vLLM died; starting it anew")
        try:
            await asyncio.to_thread(life.llm.shutdown)
            self._life = await self._begin()
        except Exception as error:
            logger.exception("vLLM could not be started anew")
            self._death = EngineDeadError(f"vLLM could not be started anew: {error}")
            return
        self._num_restarts += 1
        self._death = None

    async def stop(self) -> None:
        self._death = EngineDeadError("the engine is shutting down")
        if self._revival is not None:
            self._revival.cancel()
            await asyncio.gather(self._revival, return_exceptions=True)
        life, self._life = self._life, None
        if life is None:
            return
        # Shutting down does not wake those that wait for an output.
        life.llm.output_processor.propagate_error(self._death)
        await asyncio.sleep(0)
        await asyncio.to_thread(life.llm.shutdown)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        await self.check_health()
        life = self._life
        assert life is not None
        self._check(request)
        counter, mode = life.observer.waiting, request.reasoning.mode
        counter[mode] += 1
        try:
            async with contextlib.aclosing(self._outputs(life, request)) as outputs:
                async for output in outputs:
                    if counter is life.observer.waiting:
                        counter[mode] -= 1
                        counter = life.observer.running
                        counter[mode] += 1
                    yield output
        finally:
            counter[mode] -= 1
            life.observer.note_end()

    async def _outputs(self, life: _Life, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Run one request in vLLM; raise our errors instead of vLLM's."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

        # Not a stop token, and not in a bad word, which a step without text interrupts.
        taken = request.sampling.stop_token_ids.union(*request.sampling.bad_words)
        hidden = next(i for i in range(self.info.vocab_size) if i not in taken)
        size = self.info.hidden_size
        thinking = worker_params(request, hidden_size=size, hidden_token_id=hidden)
        reader = OutputReader(request, thinking)
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)}
        params = _sampling_params(request, to_extra_args(thinking), thinking.report_width)
        stream = life.llm.generate(prompt, params, request.request_id, lora_request=self._adapter)
        try:
            async with contextlib.aclosing(stream) as chunks:
                async for chunk in chunks:
                    for output in _read(chunk, reader):
                        self._count(life, request, output)
                        yield output
                        if output.finish_reason is not None:
                            return
        except VllmDeadError as error:
            self._note_death(life)
            raise EngineDeadError("vLLM died", retry_after_seconds=30) from error
        except VLLMClientError as error:
            raise InvalidRequestError(
                str(error), param=getattr(error, "parameter", None)
            ) from error
        except CoconutError:
            raise
        except Exception as error:
            if self._death is not None:
                raise EngineDeadError(self._death.message) from error
            raise GenerationError(f"vLLM failed: {error}") from error
        raise GenerationError("vLLM ended the request without a reason")

    def _count(self, life: _Life, request: Request, output: RequestOutput) -> None:
        mode = request.reasoning.mode
        feeds = properties_of(mode).feeds if output.is_vector else Feeds.TOKEN
        life.observer.count_row(mode, feeds.value)

    def _check(self, request: Request) -> None:
        """Reject what can never run; exceeding vLLM's limits would kill its worker."""
        check_request(request, self.info)
        is_dense = not request.reasoning.pad_positions
        require(is_dense, "reasoning.pad_positions", "must be false: vLLM numbers positions itself")
        sampling = request.sampling
        is_plain = sampling.num_prompt_logprobs is None
        require(is_plain, "echo", "with logprobs is not supported by the vllm engine")
        num_stops = len(sampling.stop_token_ids) if sampling.min_tokens else 0
        require(num_stops <= _MAX_STOPS, "stop_token_ids", f"takes {_MAX_STOPS} with min_tokens")
        num_biases = len(_biases(request))
        require(num_biases <= _MAX_BIASES, "logit_bias", f"takes {_MAX_BIASES} with banned tokens")


def _biases(request: Request) -> dict[int, float]:
    """logit_bias and banned tokens."""
    sampling = request.sampling
    return dict(sampling.logit_bias) | dict.fromkeys(sampling.banned_token_ids, -100.0)


def _stops(request: Request) -> frozenset[int]:
    """Ids at which vLLM itself may stop: not the forced end of a thought, and no readout."""
    params = request.reasoning
    has_readouts = params.steps > 0 and params.is_fixed and properties_of(params.mode).has_text
    if has_readouts:
        return frozenset()  # OutputReader stops the answer
    return request.sampling.stop_token_ids - {*params.end_token_ids}


def _sampling_params(request: Request, extra_args: dict[str, Any], report_width: int) -> Any:
    """Convert to vLLM's SamplingParams, where thinking positions are output tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling, params = request.sampling, request.reasoning
    num_thinking = params.max_thinking
    return SamplingParams(
        max_tokens=request.max_new_positions,
        min_tokens=min(num_thinking + sampling.min_tokens, request.max_new_positions)
        if sampling.min_tokens and counts_by_itself(params)
        else 0,
        temperature=0.0 if sampling.is_greedy else sampling.temperature,
        top_p=1.0 if sampling.is_greedy else sampling.top_p,
        top_k=0 if sampling.is_greedy else sampling.top_k,
        min_p=0.0 if sampling.is_greedy else sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=_biases(request) or None,
        allowed_token_ids=list(sampling.allowed_token_ids) or None,
        _bad_words_token_ids=[list(word) for word in sampling.bad_words] or None,
        seed=sampling.seed,
        stop_token_ids=sorted(_stops(request)),
        ignore_eos=True,  # EOS is among the stop ids, if it may stop anything
        logprobs=report_width - 1 if report_width else None,
        flat_logprobs=report_width > 0,
        detokenize=False,
        skip_clone=True,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra_args,
    )


def _read(chunk: Any, reader: OutputReader) -> list[RequestOutput]:
    """Read all tokens of a chunk; vLLM joins outputs that were not fetched in time."""
    [completion] = chunk.outputs
    metrics = chunk.metrics
    if completion.finish_reason in ("abort", "error"):
        raise GenerationError(f"vLLM ended the request: {completion.finish_reason}")
    tokens, flat = list(completion.token_ids), completion.logprobs
    outputs = []
    for i, token_id in enumerate(tokens):
        columns = None
        if flat:
            columns = flat.logprobs[flat.start_indices[i] : flat.end_indices[i]]
        output = reader.read(
            token_id,
            columns,
            is_last=chunk.finished and i == len(tokens) - 1,
            num_cached=chunk.num_cached_tokens or 0,
            num_preemptions=metrics.num_preemptions if metrics else 0,
            queue_seconds=max(0.0, metrics.scheduled_ts - metrics.queued_ts) if metrics else 0.0,
        )
        outputs.append(output)
        if output.finish_reason is not None:
            break
    return outputs


def _describe(config: Any, modes: tuple[str, ...], status: dict[str, Any], lora: Any) -> EngineInfo:
    """Build EngineInfo from vLLM's configuration and the status of its workers."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    facts = {
        "dtype": str(model.dtype),
        "vllm": plugin.vllm_version(),
        "quantization": str(model.quantization),
        "tensor_parallel_size": parallel.tensor_parallel_size,
    }
    if lora is not None:
        path = Path(lora.lora_path)
        facts["lora"] = fingerprint(path, settings=(path / "adapter_config.json").read_text())
    return EngineInfo(
        engine="vllm",
        vocab_size=model.get_vocab_size(),
        max_model_len=model.max_model_len,
        kv_cache_positions=(cache.num_gpu_blocks or 0) * cache.block_size,
        block_size=cache.block_size,
        hidden_size=model.get_inputs_embeds_size(),
        modes=modes,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(config.device_config.device_type),
        adapters=status["adapters"],
        weights_bytes=status["weights_bytes"],
        kv_cache_bytes=status["kv_cache_bytes"],
        unsupported_features=plugin.UNSUPPORTED,
        fingerprint=fingerprint(Path(model.model), **facts),
    )


def _set_environment() -> None:
    """Tell the processes that vLLM starts to install the hooks."""
    os.environ[plugin.ENABLED] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "coconut_serve" not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, (allowed, "coconut_serve")))
