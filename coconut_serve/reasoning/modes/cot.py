"""`cot`: think in sampled tokens."""

from typing import ClassVar

from coconut_serve.params import ReasoningParams
from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision


class CotMode(ReasoningMode):
    """Feed each sampled token; the end-of-thought token is a halting rule."""

    name: ClassVar[str] = "cot"
    takes_samples: ClassVar[bool] = True

    @classmethod
    def needs_logits(cls, params: ReasoningParams) -> bool:
        return False  # sampling reads them anyway

    @classmethod
    def needs_sampled(cls, params: ReasoningParams) -> bool:
        return True

    def decide(self, ctx: StepContext) -> StepDecision:
        return StepDecision(token=ctx.sampled)
