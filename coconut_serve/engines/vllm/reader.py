"""Turns vLLM's output tokens of one request into our outputs."""

from coconut_serve.engines.vllm.params import Thinking
from coconut_serve.params import Phase
from coconut_serve.reasoning import report
from coconut_serve.reasoning.progress import Progress, RowResult
from coconut_serve.reasoning.registry import properties_of
from coconut_serve.types import HaltReason, Request, RequestOutput


class OutputReader:
    """Reads the tokens of one request in order.

    A step's report says what its token is. Without a report the step count says it, or the
    end-of-thought token (params.py decides which requests need a report).
    """

    def __init__(self, request: Request, thinking: Thinking) -> None:
        self._request = request
        self._thinking = thinking
        self._progress = Progress(request)

    def read(
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
            token_id: The token, as vLLM sends it.
            columns: The report of the step, if the request has one.
            is_last: vLLM sends no more.
            num_cached: Prompt positions from the prefix cache.
            num_preemptions: So far.
            queue_seconds: From arrival to the first step.
        """
        progress = self._progress
        progress.num_forward_passes += 1
        progress.num_cached_tokens, progress.num_preemptions = num_cached, num_preemptions
        progress.queue_seconds = queue_seconds
        result = report.read(self._thinking.wanted, columns) if columns else self._infer(token_id)
        return progress.advance(result, is_last=is_last)

    def _infer(self, token_id: int) -> RowResult:
        """Derive what a token without a report is."""
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
