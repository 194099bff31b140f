"""`latent`: think in hidden states, as COCONUT does."""

from typing import ClassVar

import torch
from torch import Tensor

from coconut_serve.params import ReasoningParams
from coconut_serve.reasoning.adapters import Draw
from coconut_serve.reasoning.mode import ReasoningMode, Soft, StepContext, StepDecision
from coconut_serve.reasoning.settings import choice

_CONSTANT = choice(ReasoningParams, "source", "constant")


class LatentMode(ReasoningMode):
    """Feed the last hidden state back until the row's steps run out (arXiv 2412.06769, section 3).

    The hidden state is taken after the final norm and fed unchanged, or through the adapter that
    the checkpoint was trained with. Source "constant" feeds one embedding instead: a control that
    shows whether the content of the latents matters.
    """

    name: ClassVar[str] = "latent"

    @classmethod
    def needs_logits(cls, params: ReasoningParams) -> bool:
        return params.soft_weight > 0  # to add a soft token

    def decide(self, ctx: StepContext) -> StepDecision:
        vector = self._adapt(ctx, ctx.hidden)
        token = torch.full_like(ctx.row_slots, -1)
        # Rows that need no logits are decided in a context without any.
        if ctx.logits is None or not ctx.host.soft_weight.any():
            return StepDecision(token=token, vector=self._or_constant(ctx, vector))

        def add(means: Tensor) -> Tensor:
            """Add w times the soft token, through the same adapter (SIM-CoT)."""
            weight = ctx.settings.soft_weight.unsqueeze(1)
            added = weight * self._adapt(ctx, means).float()
            return self._or_constant(ctx, (vector.float() + added).to(vector.dtype))

        return StepDecision(token=token, vector=Soft(ctx.logits.softmax(-1), add))

    def _or_constant(self, ctx: StepContext, vector: Tensor) -> Tensor:
        """Replace the vectors of rows whose source is constant."""
        if not (ctx.host.source == _CONSTANT).any():
            return vector
        fed = ctx.embedding(ctx.settings.constant_token_id.clamp_min(0)).to(vector.dtype)
        return torch.where((ctx.settings.source == _CONSTANT).unsqueeze(1), fed, vector)

    def _adapt(self, ctx: StepContext, hidden: Tensor) -> Tensor:
        rows, slots = ctx.row_slots, self.slots
        names = tuple(params.adapter for params in ctx.params)
        draw = Draw(slots.seed[rows], slots.num_decisions[rows], ctx.settings.latent_temperature)
        return ctx.adapters.apply(names, hidden, draw)
