"""`latent`: think in hidden states, as COCONUT does."""

from typing import ClassVar

import torch
from torch import Tensor

from coconut_serve.params import ReasoningParams
from coconut_serve.reasoning.adapters import NO_ADAPTER, Draw
from coconut_serve.reasoning.mode import ReasoningMode, Soft, StepContext, StepDecision
from coconut_serve.reasoning.slots import Slots


class LatentMode(ReasoningMode):
    """Feed the last hidden state back until the row's steps are spent (arXiv 2412.06769, 3).

    The hidden state is taken after the final norm and fed as it is, or through the adapter that
    the checkpoint was trained with. Source "constant" feeds one embedding instead: the control
    that tells whether what the latents hold matters.
    """

    name: ClassVar[str] = "latent"
    has_text: ClassVar[bool] = False

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._temperature = slots.register("latent_temperature", torch.float32)
        self._soft_weight = slots.register("latent_soft_weight", torch.float32)
        self._constant = slots.register("latent_constant", torch.int64)  # -1: feed hidden states
        # What the host must know to skip work that no row asked for.
        self._host_adapter = [NO_ADAPTER] * slots.num_slots
        self._host_is_constant = [False] * slots.num_slots
        self._host_is_softened = [False] * slots.num_slots

    @classmethod
    def needs_logits(cls, params: ReasoningParams) -> bool:
        """Only where a soft token is added."""
        return params.soft_weight > 0

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note what is fed."""
        is_constant = params.source == "constant"
        self._temperature[slot] = params.latent_temperature
        self._soft_weight[slot] = params.soft_weight
        token_id = params.constant_token_id if is_constant else None
        self._constant[slot] = -1 if token_id is None else token_id
        self._host_adapter[slot] = params.adapter
        self._host_is_constant[slot] = is_constant
        self._host_is_softened[slot] = params.soft_weight > 0

    def decide(self, ctx: StepContext) -> StepDecision:
        """Feed the hidden state; there is no text."""
        vector = self._adapt(ctx, ctx.hidden)
        token = torch.full_like(ctx.row_slots, -1)
        # Rows without a weight stand apart from those with one: they have no logits.
        if ctx.logits is None or not any(self._host_is_softened[s] for s in ctx.host_slots):
            return StepDecision(token=token, vector=self._or_constant(ctx, vector))

        def add(means: Tensor) -> Tensor:
            """Add w times the soft token, through the same adapter (SIM-CoT)."""
            weight = self._soft_weight[ctx.row_slots].unsqueeze(1)
            added = weight * self._adapt(ctx, means).float()
            return self._or_constant(ctx, (vector.float() + added).to(vector.dtype))

        return StepDecision(token=token, vector=Soft(ctx.logits.softmax(-1), add))

    def _or_constant(self, ctx: StepContext, vector: Tensor) -> Tensor:
        """Feed the constant instead where the source says so."""
        if not any(self._host_is_constant[slot] for slot in ctx.host_slots):
            return vector
        constant = self._constant[ctx.row_slots]
        fed = ctx.embedding(constant.clamp_min(0)).to(vector.dtype)
        return torch.where((constant >= 0).unsqueeze(1), fed, vector)

    def _adapt(self, ctx: StepContext, hidden: Tensor) -> Tensor:
        rows, slots = ctx.row_slots, self.slots
        names = tuple(self._host_adapter[slot] for slot in ctx.host_slots)
        draw = Draw(slots.seed[rows], slots.num_decisions[rows], self._temperature[rows])
        return ctx.adapters.apply(names, hidden, draw)
