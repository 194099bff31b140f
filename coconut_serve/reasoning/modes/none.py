"""`none`: answer at once."""

from typing import ClassVar

import torch

from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision


class NoneMode(ReasoningMode):
    """Do not think: the service gives such rows no steps, so nothing is left to decide."""

    name: ClassVar[str] = "none"

    def decide(self, ctx: StepContext) -> StepDecision:
        """Decide nothing; only rows without thinking steps are ever in this mode."""
        return StepDecision(token=torch.full_like(ctx.row_slots, -1))
