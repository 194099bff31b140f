"""Runs the sequences of one API call and turns their steps into text."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from coconut_serve.engines.base import Engine
from coconut_serve.errors import CoconutError, GenerationError
from coconut_serve.metrics import Metrics
from coconut_serve.params import Phase
from coconut_serve.service.admission import Admission, Places
from coconut_serve.service.ask import GenerateCall
from coconut_serve.service.detokenize import Detokenizer
from coconut_serve.service.prompt import Prepared
from coconut_serve.service.tokenizer import Tokenizer
from coconut_serve.service.tracing import Span, Value
from coconut_serve.types import (
    FinishReason,
    HaltReason,
    ReasoningTrace,
    Request,
    RequestOutput,
    SequenceCounts,
    TokenLogprobs,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenDelta:
    """One answer token and its log-probabilities."""

    token_id: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStep:
    """One thinking step as a trace shows it."""

    kind: str  # latent | distribution | token
    token_id: int | None
    trace: ReasoningTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one output adds to a choice, or a whole choice."""

    index: int
    content: str = ""
    reasoning: str = ""
    tokens: tuple[TokenDelta, ...] = ()
    trace: tuple[TraceStep, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class ChoiceState:
    """Counts and times of one choice so far."""

    counts: SequenceCounts = field(default_factory=SequenceCounts)
    halt_reason: HaltReason = HaltReason.NONE
    begun: float | None = None  # when its first output came
    thinking_seconds: float = 0.0  # from there to the first answer token, or the end


class Generation:
    """The running sequences of one call. Iterate it inside `async with`: leaving aborts them.

    Args:
        prepared: The requests.
        engine: Runs them.
        tokenizer: None for a model without one.
        admission: Places are taken on creation and given back on leaving.
        metrics: Where measurements go.
        span: Gets an event for each phase; ended on leaving.

    Raises:
        QueueFullError: The queue is full.
        NotReadyError: The server is draining.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        engine: Engine,
        tokenizer: Tokenizer | None,
        admission: Admission,
        metrics: Metrics,
        span: Span,
    ) -> None:
        self.prepared = prepared
        self._span = span
        self._error: Exception | None = None
        self._engine = engine
        self._tokenizer = tokenizer
        self._admission = admission
        self._metrics = metrics
        self.choices = [ChoiceState() for _ in prepared.requests]
        self.prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}  # by sequence
        self.shown = 0  # the choice that `reasoning_info` describes
        self._deltas: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        longest = max(request.max_new_positions for request in prepared.requests)
        try:
            places = admission.acquire(len(prepared.requests), max_positions=longest)
        except CoconutError as error:
            span.end({}, error)
            raise
        self._places: Places | None = places
        self._has_ended = False

    async def __aenter__(self) -> Self:
        """Start the sequences."""
        for index, request in enumerate(self.prepared.requests):
            self._tasks.append(asyncio.create_task(self._run(index, request)))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Abort running sequences and free their places; idempotent, allowed before entering."""
        places, self._places = self._places, None
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            if places is not None:
                self._admission.release(places, has_ended=self._has_ended)
                self._metrics.shift(self._metrics.buffered, -self._deltas.qsize())
                self._span.end(self._cost(), self._error)

    def _cost(self) -> dict[str, Value]:
        """Span attributes known at the end."""
        counts = [choice.counts for choice in self.choices]
        return {
            "gen_ai.usage.input_tokens": sum(map(len, self.prepared.prompt_token_ids)),
            "gen_ai.usage.output_tokens": sum(c.num_output_tokens for c in counts),
            "coconut.reasoning.steps": sum(c.num_reasoning_steps for c in counts),
            "coconut.latent.steps": sum(c.num_vector_steps for c in counts),
            "coconut.forward_passes": sum(c.num_forward_passes for c in counts),
        }

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield deltas of all choices until each has ended.

        Raises:
            CoconutError: A sequence failed; the others are aborted on leaving.
        """
        num_open = len(self.prepared.requests)
        while num_open:
            delta = await self._deltas.get()
            self._metrics.shift(self._metrics.buffered, -1)
            if isinstance(delta, Exception):
                raise delta
            num_open -= delta.finish_reason is not None
            self._has_ended = num_open == 0
            yield delta

    async def _run(self, index: int, request: Request) -> None:
        """Run one sequence and queue its deltas."""
        ask = self.prepared.ask
        clock = _Clock(self._metrics, request, ask, self._span, index)
        text = _ChoiceText(self._tokenizer, self.prepared, request)
        try:
            async with contextlib.aclosing(self._engine.generate(request)) as outputs:
                async for output in outputs:
                    clock.note(output)
                    self._note(index, output)
                    ended = self._emit(index, output, text)
                    if ended is not None:
                        clock.end(output.counts, ended)
                        return
        except CoconutError as error:
            clock.fail("deadline" if self._admission.is_overdue else "error")
            self._put(error)
        except asyncio.CancelledError:
            clock.cancel(self.choices[index].counts)
            raise
        except Exception as error:
            logger.exception("generation failed, request_id=%s", request.request_id)
            clock.fail("error")
            failure = GenerationError(f"generation failed: {type(error).__name__}")
            self._put(failure)

    def _put(self, delta: Delta | Exception) -> None:
        if isinstance(delta, Exception):
            self._error = delta
        self._metrics.shift(self._metrics.buffered, 1)
        self._deltas.put_nowait(delta)

    def _note(self, index: int, output: RequestOutput) -> None:
        state, now, counts = self.choices[index], time.monotonic(), output.counts
        state.begun = now if state.begun is None else state.begun
        if output.phase is not Phase.ANSWER or counts.num_output_tokens <= 1:
            is_thinker = counts.num_reasoning_steps > 0
            state.thinking_seconds = now - state.begun if is_thinker else 0.0
        state.counts = counts
        if output.prompt_logprobs:
            self.prompt_logprobs[index] = output.prompt_logprobs
        if self._places is not None:
            made = counts.num_output_tokens + counts.num_reasoning_steps + counts.num_forced_tokens
            self._places.num_done = max(self._places.num_done, made)
        if output.halt_reason is not HaltReason.NONE:
            state.halt_reason = output.halt_reason

    def _emit(self, index: int, output: RequestOutput, text: "_ChoiceText") -> FinishReason | None:
        """Queue the delta of an output; return the finish reason once the choice has ended."""
        content, reasoning = text.push(output)
        finish_reason, stop_reason = output.finish_reason, output.stop_reason
        if finish_reason is not None:
            rest_content, rest_reasoning = text.flush()
            content, reasoning = content + rest_content, reasoning + rest_reasoning
        if text.stopped_by is not None:
            finish_reason, stop_reason = FinishReason.STOP, text.stopped_by
        tokens: tuple[TokenDelta, ...] = ()
        if output.phase is Phase.ANSWER and output.token_id is not None:
            tokens = (TokenDelta(token_id=output.token_id, logprobs=output.logprobs),)
        delta = Delta(
            index=index,
            content=content,
            reasoning=reasoning,
            tokens=tokens,
            trace=_trace_steps(output, self.prepared.mode),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
        if delta != Delta(index=index):
            self._put(delta)
        return finish_reason


class _ChoiceText:
    """Thinking and answer text of one choice, kept apart."""

    def __init__(self, tokenizer: Tokenizer | None, prepared: Prepared, request: Request) -> None:
        sampling = prepared.ask.sampling
        self._answer = Detokenizer(
            tokenizer,
            stop=sampling.stop,
            include_stop=sampling.include_stop,
            skip_special_tokens=sampling.skip_special_tokens,
            min_tokens=request.sampling.min_tokens,
            context=prepared.ask.text_context(request),
        )
        self._thinking = Detokenizer(tokenizer)
        self._is_thinking = True

    @property
    def stopped_by(self) -> str | None:
        return self._answer.stopped_by

    def push(self, output: RequestOutput) -> tuple[str, str]:
        """Return new (content, reasoning)."""
        if output.token_id is None:
            return "", ""
        if output.phase is Phase.THINK:
            return "", self._thinking.push(output.token_id)
        rest = ""
        if self._is_thinking:
            self._is_thinking = False
            rest = self._thinking.flush()
        content = self._answer.push(output.token_id) if output.phase is Phase.ANSWER else ""
        return content, rest

    def flush(self) -> tuple[str, str]:
        rest = self._thinking.flush() if self._is_thinking else ""
        return self._answer.flush(), rest


def _trace_steps(output: RequestOutput, mode: str) -> tuple[TraceStep, ...]:
    if output.trace is None:
        return ()
    kind = mode if output.is_vector else "token"
    return (TraceStep(kind=kind, token_id=output.token_id, trace=output.trace),)


class _Clock:
    """Measures one sequence: arrival, first result, first answer token, gaps, end."""

    def __init__(
        self, metrics: Metrics, request: Request, ask: GenerateCall, span: Span, index: int
    ) -> None:
        self._metrics = metrics
        self._span, self._index = span, index
        self._mode = request.reasoning.mode
        self._endpoint = ask.endpoint
        self._num_prompt = len(request.prompt_token_ids)
        self._arrival, self._begun = ask.arrival, time.monotonic()
        self._first: float | None = None
        self._first_answer: float | None = None
        self._last_answer: float | None = None

    def _event(self, name: str, **attributes: Value) -> None:
        self._span.event(name, {"choice": self._index, **attributes})

    def note(self, output: RequestOutput) -> None:
        now, m, mode = time.monotonic(), self._metrics, self._mode
        if self._first is None:
            self._first = now
            m.observe(m.ttft, now - self._arrival, mode)
            m.observe(m.queue, output.queue_seconds, mode)
            m.observe(m.prefill, now - self._begun - output.queue_seconds, mode)
            m.add(m.prompt_tokens, self._num_prompt, mode)
            m.observe(m.request_prompt_tokens, self._num_prompt, mode)
            m.add(m.cached_tokens, output.counts.num_cached_tokens, mode)
            self._event("prefill", queue_seconds=output.queue_seconds)
        if output.halt_reason is not HaltReason.NONE:
            m.add(m.halts, 1, mode, output.halt_reason.label)
            steps = output.counts.num_reasoning_steps
            self._event("thinking", steps=steps, halt_reason=output.halt_reason.label)
        if output.phase is not Phase.ANSWER or output.token_id is None:
            return
        if self._first_answer is None:
            self._first_answer = now
            m.observe(m.ttfot, now - self._arrival, mode)
            self._event("decode")
            if output.counts.num_reasoning_steps:
                m.observe(m.latent_phase, now - self._first, mode)
        elif self._last_answer is not None:
            m.observe(m.itl, now - self._last_answer, mode)
        self._last_answer = now
        m.add(m.generation_tokens, 1, mode)

    def end(self, counts: SequenceCounts, reason: FinishReason) -> None:
        now, m, mode = time.monotonic(), self._metrics, self._mode
        m.observe(m.duration, now - self._arrival, mode)
        m.observe(m.request_output_tokens, counts.num_output_tokens, mode)
        m.observe(m.latent_steps_per_request, counts.num_vector_steps, mode)
        m.observe(m.sequence_preemptions, counts.num_preemptions, mode)
        if self._first_answer is not None:
            m.observe(m.decode, now - self._first_answer, mode)
            if counts.num_output_tokens > 1:
                gap = (now - self._first_answer) / (counts.num_output_tokens - 1)
                m.observe(m.tpot, gap, mode)
        self._count_thinking(counts)
        self._event("end", finish_reason=reason.value, output_tokens=counts.num_output_tokens)
        m.add(m.requests, 1, mode, self._endpoint, reason.value)

    def _count_thinking(self, counts: SequenceCounts) -> None:
        m, mode = self._metrics, self._mode
        m.add(m.reasoning_tokens, counts.num_reasoning_steps, mode)
        m.add(m.latent_steps, counts.num_vector_steps, mode)

    def fail(self, outcome: str) -> None:
        self._metrics.add(self._metrics.requests, 1, self._mode, self._endpoint, outcome)

    def cancel(self, counts: SequenceCounts) -> None:
        """Record a sequence whose client went away."""
        m, mode = self._metrics, self._mode
        stage = "queued" if self._first is None else "thinking"
        stage = stage if self._first_answer is None else "decode"
        self._event("cancelled", stage=stage)
        m.add(m.requests, 1, mode, self._endpoint, "cancelled")
        m.add(m.cancelled, 1, mode, stage)
        m.add(m.wasted_tokens, counts.num_output_tokens + counts.num_reasoning_steps, mode)
        self._count_thinking(counts)
