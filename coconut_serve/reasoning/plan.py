"""What the host plans for one row of a step. Importing this loads no torch."""

from dataclasses import dataclass, replace
from typing import Any

from coconut_serve.params import ReasoningParams
from coconut_serve.types import Request

# What a step's kernels depend on. Sorting rows by it makes equal ones a slice, not a gather.
StepClass = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a client wants reported of each step, besides the token."""

    num_logprobs: int | None = None  # of answer tokens; None: off
    trace_top_k: int | None = None  # of thinking steps; None: no trace; 0: no logit lens
    wants_vector: bool = False

    @classmethod
    def read(cls, request: Request) -> "Wanted":
        params = request.reasoning
        has_trace = params.steps > 0 and params.trace != "none"
        return cls(
            num_logprobs=request.sampling.num_logprobs,
            trace_top_k=(params.trace_top_k if params.has_topk_trace else 0) if has_trace else None,
            wants_vector=params.trace == "vectors",
        )

    @property
    def of_answers(self) -> "Wanted":
        """What remains of it in the answer phase."""
        return replace(self, trace_top_k=None, wants_vector=False)

    @property
    def has_scores(self) -> bool:
        """Whether it needs log-probabilities."""
        return self.num_logprobs is not None or self.trace_top_k is not None

    @property
    def num_top(self) -> int:
        """Number of likeliest tokens in the report."""
        least = 0 if self.trace_top_k is None else 1  # the likeliest gives max_prob
        return max(self.num_logprobs or 0, self.trace_top_k or 0, least)


NOTHING = Wanted()


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What the thinking steps of a request use."""

    logits: bool = False  # its mode or a halting rule reads them
    sampled: bool = False  # each step samples a token
    step_class: StepClass = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """What the host knows of one row before the step, without waiting for a tensor.

    Any flag may be True needlessly: that costs time, not exactness.
    """

    slot: int
    mode: str
    num_steps: int = 0  # thinking steps before this one, while the row thinks
    may_think: bool  # False once the host has seen the phase end
    asks_mode: bool  # its mode decides: it may think, or mixes its answer
    needs_logits: bool
    needs_sampled: bool  # samples a token from the logits
    thinks_on_logits: bool = False  # the mode, if asked, or a halting rule reads them
    draws_apart: bool = False  # thinking tokens are sampled with settings of their own
    wanted: Wanted = NOTHING


def plan_row(
    params: ReasoningParams,
    needs: Needs,
    *,
    slot: int,
    num_steps: int,
    may_think: bool,
    may_answer: bool,
    has_own_draw: bool,
    is_sampled: bool,
    is_read: bool,
    wanted: Wanted,
) -> RowPlan:
    """Plan the next decision of one row.

    Args:
        params: The request's settings.
        needs: What the request's thinking steps use.
        slot: The row's slot.
        num_steps: Thinking steps so far.
        may_think: The row may still be in a thinking phase.
        may_answer: This step may make an answer token.
        has_own_draw: Thinking tokens have sampling settings of their own.
        is_sampled: This step samples a token.
        is_read: Sampling or a report reads the logits.
        wanted: What the client wants reported of this step.
    """
    asks_mode = may_think or (params.mixture.in_answer and may_answer)
    thinks_on_logits = asks_mode and needs.logits
    draws_apart = has_own_draw and may_think and needs.sampled
    return RowPlan(
        slot=slot,
        mode=params.mode,
        num_steps=num_steps,
        may_think=may_think,
        asks_mode=asks_mode,
        needs_logits=is_read or thinks_on_logits or draws_apart,
        needs_sampled=is_sampled,
        thinks_on_logits=thinks_on_logits,
        draws_apart=draws_apart,
        wanted=wanted,
    )
