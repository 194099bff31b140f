"""`latent`: think in hidden states, as COCONUT does."""

from typing import ClassVar

import torch

from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision


class LatentMode(ReasoningMode):
    """Feed the last hidden state back until the row's steps are spent (arXiv 2412.06769, 3).

    The hidden state is taken after the final norm and fed as it is: no projection, no scaling.
    The step itself counts down `steps` and then forces the end token.
    """

    name: ClassVar[str] = "latent"
    needs_logits: ClassVar[bool] = False

    def decide(self, ctx: StepContext) -> StepDecision:
        """Feed the hidden state; there is no text."""
        return StepDecision(token=torch.full_like(ctx.row_slots, -1), vector=ctx.hidden)
