"""A whole new way of thinking: what tests/test_new_mode.py adds with this file and one line."""

from typing import ClassVar

from coconut_serve.params import ReasoningParams
from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision


class NegatedMode(ReasoningMode):
    """Feed the hidden state upside down."""

    name: ClassVar[str] = "negated"

    @classmethod
    def needs_logits(cls, params: ReasoningParams) -> bool:
        """None are looked at."""
        return False

    def decide(self, ctx: StepContext) -> StepDecision:
        """Negate."""
        return StepDecision(token=ctx.row_slots * 0 - 1, vector=-ctx.hidden)
