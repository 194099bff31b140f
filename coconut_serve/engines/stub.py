"""A deterministic engine without tensors, with configurable speed and failures, for tests.

Answers repeat the prompt's ids except stop tokens, and so do thinking steps of modes with text;
those of `latent` have no tokens. Where a stop token may end a thought, it comes after 16 steps,
or after `min_steps`.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace

from coconut_serve.config import StubConfig
from coconut_serve.engines.base import EngineInfo, OnStep, check_request
from coconut_serve.errors import EngineDeadError, GenerationError
from coconut_serve.params import Phase
from coconut_serve.reasoning.progress import Progress, RowResult
from coconut_serve.reasoning.registry import Feeds, mode_names, properties_of
from coconut_serve.types import (
    HaltReason,
    ReasoningTrace,
    Request,
    RequestOutput,
    StepStats,
    TokenLogprobs,
)

_TRACE = ReasoningTrace(entropy=0.0, max_prob=1.0, norm=1.0, cosine=1.0, retained_mass=1.0)
_NUM_BLOCKS = 4096
_BLOCK_SIZE = 16
_THOUGHT_TOKENS = 16  # then it ends the thought


class StubEngine:
    """Generates by rule; requests run concurrently.

    Args:
        config: Speed and scripted failures.
        vocab_size: Ids below this are valid.
        max_model_len: Positions a sequence may have.
        max_num_seqs: Sequences that run at once; others wait.
        on_step: Called for each position of each sequence.
    """

    def __init__(
        self,
        config: StubConfig,
        *,
        vocab_size: int,
        max_model_len: int,
        max_num_seqs: int,
        on_step: OnStep,
    ) -> None:
        self._config = config
        self._on_step = on_step
        self._slots = asyncio.Semaphore(max_num_seqs)
        self._running: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._num_used_blocks = 0
        self._num_requests = 0
        self._death: EngineDeadError | None = EngineDeadError("the engine is not running")
        self.info = EngineInfo(
            engine="stub",
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            kv_cache_positions=_NUM_BLOCKS * _BLOCK_SIZE,
            block_size=_BLOCK_SIZE,
            modes=mode_names(),
        )
        self.num_restarts = 0

    async def start(self) -> None:
        self._death = None

    async def stop(self) -> None:
        self._death = EngineDeadError("the engine is shutting down")

    async def check_health(self) -> None:
        if self._death is not None:
            raise EngineDeadError(self._death.message)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        await self.check_health()
        check_request(request, self.info)
        arrival = time.monotonic()
        mode = request.reasoning.mode
        self._waiting[mode] += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting[mode] -= 1
        self._running[mode] += 1
        blocks = -(-request.max_num_positions // _BLOCK_SIZE)
        self._num_used_blocks += blocks
        try:
            self._count_request()
            queue_seconds = time.monotonic() - arrival
            await asyncio.sleep(self._config.ttft_seconds)
            async for output in self._steps(request):
                yield replace(output, queue_seconds=queue_seconds)
        finally:
            self._running[mode] -= 1
            self._num_used_blocks -= blocks
            self._slots.release()
            self._report({})

    def _count_request(self) -> None:
        """Count a request; die after `fail_after_requests` of them."""
        self._num_requests += 1
        allowed = self._config.fail_after_requests
        if allowed is not None and self._num_requests > allowed:
            self._death = EngineDeadError("scripted failure")
            raise self._death

    async def _steps(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """The positions of a request: thinking, boundary, answer."""
        params, ids = request.reasoning, list(request.prompt_token_ids)
        own = properties_of(params.mode)
        steps, cause = params.steps, HaltReason.CAP
        thought = max(_THOUGHT_TOKENS, params.min_steps)
        if params.halt.stop_token_ids and own.has_text and steps > thought:
            steps, cause = thought, HaltReason.STOP_TOKEN
        lengths = (steps, len(params.end_token_ids), request.sampling.max_tokens)
        kinds = [phase for phase, length in zip(Phase, lengths, strict=True) for _ in range(length)]
        del kinds[request.max_new_positions :]
        ids = [each for each in ids if each not in request.sampling.stop_token_ids] or ids
        done, progress = Counter[Phase](), Progress(request)
        for position, phase in enumerate(kinds):
            await self._pace(position)
            thinks = phase is Phase.THINK
            feeds = thinks or (phase is Phase.ANSWER and params.mixture.in_answer)
            is_vector = feeds and own.is_steady
            token_id = ids[done[phase] % len(ids)]
            done[phase] += 1
            fed = own.feeds if is_vector else Feeds.TOKEN
            self._report({(params.mode, fed.value): 1})
            result = RowResult(
                phase=phase,
                token_id=None if thinks and not own.has_text else token_id,
                is_vector=is_vector,
                halt_reason=cause if steps > 0 and position == steps else HaltReason.NONE,
                logprobs=_logprobs(request, token_id) if phase is Phase.ANSWER else None,
                trace=_TRACE if thinks and params.trace != "none" else None,
            )
            progress.num_forward_passes += 1
            output = progress.advance(result, is_last=position == len(kinds) - 1)
            if position == 0 and request.sampling.num_prompt_logprobs is not None:
                scores = tuple(_certain(i) for i in request.prompt_token_ids[1:])
                output = replace(output, prompt_logprobs=scores)
            yield output
            if output.finish_reason is not None:
                return

    async def _pace(self, position: int) -> None:
        """Sleep for one position; fail at `fail_at_token`."""
        if self._death is not None:
            raise EngineDeadError(self._death.message)
        if position == self._config.fail_at_token:
            raise GenerationError("scripted failure of this request")
        speed = self._config.tokens_per_second
        await asyncio.sleep(1.0 / speed if speed and position else 0.0)

    def _report(self, rows: dict[tuple[str, str], int]) -> None:
        speed = self._config.tokens_per_second
        self._on_step(
            StepStats(
                seconds=1.0 / speed if speed else 0.0,
                num_rows=rows,
                num_prefill_positions=0,
                num_running=dict(self._running),
                num_waiting=dict(self._waiting),
                num_preemptions=0,
                num_free_blocks=_NUM_BLOCKS - self._num_used_blocks,
                num_cached_blocks=0,
                num_used_blocks=self._num_used_blocks,
                num_prefix_queries=0,
                num_prefix_hits=0,
            )
        )


def _certain(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(logprob=0.0, top=((token_id, 0.0),))


def _logprobs(request: Request, token_id: int) -> TokenLogprobs | None:
    num = request.sampling.num_logprobs
    return None if num is None else TokenLogprobs(logprob=0.0, top=((token_id, 0.0),) * min(num, 1))
