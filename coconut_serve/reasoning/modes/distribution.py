"""`distribution`: think in soft tokens."""

from typing import ClassVar

from coconut_serve.params import ReasoningParams
from coconut_serve.reasoning.mixers import KINDS, Mixers
from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision
from coconut_serve.reasoning.plan import StepClass
from coconut_serve.reasoning.slots import Slots


class DistributionMode(ReasoningMode):
    """Feed an average of embeddings (Soft Thinking, arXiv 2505.15778, and its relatives).

    mixers.py computes the average, halting.py ends the phase.
    """

    name: ClassVar[str] = "distribution"
    is_tempered: ClassVar[bool] = True

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._mixers = Mixers()

    @classmethod
    def needs_sampled(cls, params: ReasoningParams) -> bool:
        return KINDS[params.mixture.kind].needs_sampled

    @classmethod
    def step_class(cls, params: ReasoningParams) -> StepClass:
        return Mixers.step_class(params.mixture)

    def decide(self, ctx: StepContext) -> StepDecision:
        return self._mixers.mix(ctx)
