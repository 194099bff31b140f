"""`none`: answer at once."""

from typing import ClassVar

import torch

from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision


class NoneMode(ReasoningMode):
    """Do not think: the service gives such rows no steps, so this mode decides nothing."""

    name: ClassVar[str] = "none"

    def decide(self, ctx: StepContext) -> StepDecision:
        return StepDecision(token=torch.full_like(ctx.row_slots, -1))
