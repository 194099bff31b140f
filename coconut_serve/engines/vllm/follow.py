"""From what vLLM sends of one request to our outputs: phases, stops, counts."""

from dataclasses import replace

from coconut_serve.engines.vllm.params import Thinking
from coconut_serve.params import Phase
from coconut_serve.reasoning import report
from coconut_serve.reasoning.registry import properties_of
from coconut_serve.reasoning.rows import RowResult
from coconut_serve.reasoning.step import Progress
from coconut_serve.types import FinishReason, HaltReason, Request, RequestOutput, SequenceCounts


class Follower:
    """Reads the tokens of one request in order.

    Where a step sends its report, the report says what a token is. Without one the count of
    steps says it, or the end-of-thought token (params.py decides which requests need a report).
    """

    def __init__(self, request: Request, thinking: Thinking) -> None:
        self._request = request
        self._thinking = thinking
        self._progress = Progress.start(request.reasoning)
        self._counts = SequenceCounts()

    def follow(
        self,
        token_id: int,
        columns: list[float] | None,
        *,
        is_last: bool,
        num_cached: int,
        num_preemptions: int,
        queue_seconds: float,
    ) -> RequestOutput:
        """Read the next token.

        Args:
            token_id: What vLLM calls the token.
            columns: The report of the step, where the request has one.
            is_last: vLLM sends no more.
            num_cached: Prompt positions from the prefix cache.
            num_preemptions: So far.
            queue_seconds: From arrival to the first step.
        """
        sampling = self._request.sampling
        result = report.read(self._thinking.wanted, columns) if columns else self._infer(token_id)
        may_end = self._request.reasoning.may_end_in(result.phase)
        is_stop = may_end and result.token_id in sampling.stop_token_ids
        self._counts = replace(
            self._counts,
            num_forward_passes=self._counts.num_forward_passes + 1,
            num_cached_tokens=num_cached,
            num_preemptions=num_preemptions,
        )
        finish_reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if result.halt_reason is HaltReason.NUMERICAL:
            finish_reason, stop_reason = FinishReason.STOP, "numerical"
        elif is_stop:
            finish_reason, stop_reason = FinishReason.STOP, result.token_id
        else:
            self._note(result)
            has_all = self._progress.has_answered(sampling.max_tokens)
            finish_reason = FinishReason.LENGTH if has_all or is_last else None
        is_ended_by_stop = finish_reason is FinishReason.STOP
        halt = result.halt_reason
        if halt is HaltReason.CAP and self._request.reasoning.is_fixed:
            halt = HaltReason.FIXED
        return RequestOutput(
            request_id=self._request.request_id,
            phase=result.phase,
            token_id=None if is_ended_by_stop else result.token_id,
            is_vector=result.is_vector and not is_ended_by_stop,
            logprobs=None if is_ended_by_stop else result.logprobs,
            trace=result.trace,
            halt_reason=halt,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            counts=self._counts,
            queue_seconds=queue_seconds,
        )

    def _note(self, result: RowResult) -> None:
        self._progress.note(result)
        counts = self._counts
        self._counts = replace(
            counts,
            num_output_tokens=counts.num_output_tokens + (result.phase is Phase.ANSWER),
            num_reasoning_steps=counts.num_reasoning_steps + (result.phase is Phase.THINK),
            num_switches=counts.num_switches + result.is_switch,
            num_forced_tokens=counts.num_forced_tokens + (result.phase is Phase.BOUNDARY),
            num_vector_steps=counts.num_vector_steps
            + (result.is_vector and result.phase is Phase.THINK),
        )

    def _infer(self, token_id: int) -> RowResult:
        """Say what a token without a report is."""
        params, progress = self._request.reasoning, self._progress
        halt = HaltReason.NONE
        if progress.is_thinking:
            is_text = not properties_of(params.mode).feeds_vectors
            if progress.num_steps_left <= 0:
                halt = HaltReason.CAP
            elif is_text and token_id in params.halt.stop_token_ids:
                halt = HaltReason.STOP_TOKEN
            elif not is_text and token_id in self._thinking.answer_stop_token_ids:
                halt = HaltReason.NUMERICAL  # nothing else ends a row whose positions have no token
            else:
                return RowResult(
                    phase=Phase.THINK,
                    token_id=token_id if is_text else None,
                    is_vector=not is_text,
                    halt_reason=HaltReason.NONE,
                )
        is_forced = progress.num_forced_left > 0 and halt is not HaltReason.NUMERICAL
        return RowResult(
            phase=Phase.BOUNDARY if is_forced else Phase.ANSWER,
            token_id=token_id,
            is_vector=False,
            halt_reason=halt,
        )
