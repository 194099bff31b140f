"""The host side of one sequence, in every engine: plan each step, record its result.

Importing this loads no torch.
"""

from dataclasses import dataclass

from coconut_serve.params import Phase
from coconut_serve.reasoning.plan import Needs, RowPlan, StepClass, Wanted, plan_row
from coconut_serve.types import (
    FinishReason,
    HaltReason,
    ReasoningTrace,
    Request,
    RequestOutput,
    SequenceCounts,
    TokenLogprobs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What a step decided for one row, on the host."""

    phase: Phase
    token_id: int | None  # None: a step without text
    is_vector: bool
    halt_reason: HaltReason  # set on the decision that ended the thinking phase
    is_switch: bool = False  # between tokens and vectors
    logprobs: TokenLogprobs | None = None
    trace: ReasoningTrace | None = None


class Progress:
    """Tracks the phase, budgets and totals of one sequence.

    The engine sets what only it knows: `num_forward_passes`, `num_cached_tokens`,
    `num_preemptions` and `queue_seconds`.

    Args:
        request: The request to generate.
        needs: What its thinking steps use; only `plan` and `step_class` read it.
    """

    def __init__(self, request: Request, needs: Needs | None = None) -> None:
        params = request.reasoning
        opens_at_once = params.enter_token_id is None
        self.request = request
        self.is_thinking = params.steps > 0 and opens_at_once
        self.num_steps_left = params.steps
        self.num_forced_left = params.num_forced if opens_at_once else 0
        self.num_forward_passes = self.num_cached_tokens = self.num_preemptions = 0
        self.queue_seconds: float | None = None  # from arrival to the first step
        self._needs = needs or Needs()
        self._wanted = Wanted.read(request)
        self._wanted_of_answers = self._wanted.of_answers
        self._num_blocks_left = 0 if opens_at_once else params.max_blocks  # that may still open
        self._is_cut_short = False  # `max_switches` ended the phase
        self._num_output_tokens = self._num_steps = self._num_vector_steps = 0
        self._num_forced_tokens = self._num_switches = 0

    @property
    def step_class(self) -> StepClass:
        """The key by which a step sorts its rows."""
        needs = self._needs
        own = (needs.sampled, needs.logits, needs.step_class) if self.is_thinking else ()
        return (not self.is_thinking, *own)

    def plan(self, slot: int) -> RowPlan:
        """Plan the next decision of the sequence in `slot`."""
        params, thinks = self.request.reasoning, self.is_thinking
        may_leave = not thinks or self.num_steps_left <= 0 or params.halt.may_halt
        may_answer = may_leave and self.num_forced_left == 0
        is_sampled = may_answer or (thinks and self._needs.sampled)
        wanted = self._wanted if thinks else self._wanted_of_answers
        return plan_row(
            params,
            self._needs,
            slot=slot,
            num_steps=self._num_steps,
            may_think=thinks,
            may_answer=may_answer,
            has_own_draw=self.request.thinking is not None,
            is_sampled=is_sampled,
            is_read=is_sampled or wanted.trace_top_k is not None,
            wanted=wanted,
        )

    def advance(self, result: RowResult, *, is_last: bool = False) -> RequestOutput:
        """Record one decision.

        Args:
            result: The decision. One that stops the sequence is not counted.
            is_last: The engine has no room for another.

        Returns:
            What the decision adds for the client, with a finish reason if the sequence is over.
        """
        finish_reason: FinishReason | None = None
        stop_reason = self._stop_reason(result)
        is_stop = stop_reason is not None
        if is_stop:
            finish_reason = FinishReason.STOP
        else:
            self._count(result)
            finish_reason = FinishReason.LENGTH if is_last or self._has_answered() else None
        is_exact = result.halt_reason is HaltReason.CAP and self.request.reasoning.is_fixed
        return RequestOutput(
            request_id=self.request.request_id,
            phase=result.phase,
            token_id=None if is_stop else result.token_id,
            is_vector=result.is_vector and not is_stop,
            logprobs=None if is_stop or result.token_id is None else result.logprobs,
            trace=result.trace,
            halt_reason=HaltReason.FIXED if is_exact else result.halt_reason,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            counts=self._counts(),
            queue_seconds=self.queue_seconds or 0.0,
        )

    def _stop_reason(self, result: RowResult) -> str | int | None:
        if result.halt_reason is HaltReason.NUMERICAL:
            return "numerical"
        may_end = self.request.reasoning.may_end_in(result.phase)
        is_stop = may_end and result.token_id in self.request.sampling.stop_token_ids
        return result.token_id if is_stop else None

    def _count(self, result: RowResult) -> None:
        params, phase = self.request.reasoning, result.phase
        thinks = phase is Phase.THINK
        self.is_thinking = self.is_thinking and thinks
        self.num_steps_left -= thinks
        self._num_steps += thinks
        self._num_vector_steps += thinks and result.is_vector
        self._num_switches += result.is_switch
        if result.halt_reason is HaltReason.SWITCHES:
            self._is_cut_short = True
            self.num_forced_left = len(params.switch.final_token_ids) or self.num_forced_left
        self.num_forced_left -= phase is Phase.BOUNDARY
        self._num_forced_tokens += phase is Phase.BOUNDARY
        self._num_output_tokens += phase is Phase.ANSWER
        if phase is Phase.ANSWER and self._num_blocks_left:
            self._open_block(result.token_id)

    def _open_block(self, token_id: int | None) -> None:
        """Start another thinking phase if the token opens one."""
        params = self.request.reasoning
        if token_id == params.enter_token_id:
            self.is_thinking = True
            self._num_blocks_left -= 1
            self.num_steps_left = params.steps
            self.num_forced_left = params.num_forced

    def _has_answered(self) -> bool:
        most = self.request.sampling.max_tokens
        bound = self.request.reasoning.switch.answer_tokens if self._is_cut_short else 0
        return self._num_output_tokens >= min(most, bound or most)

    def _counts(self) -> SequenceCounts:
        return SequenceCounts(
            num_output_tokens=self._num_output_tokens,
            num_reasoning_steps=self._num_steps,
            num_vector_steps=self._num_vector_steps,
            num_forced_tokens=self._num_forced_tokens,
            num_switches=self._num_switches,
            num_forward_passes=self.num_forward_passes,
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
        )
