"""`cot`: think in sampled tokens."""

from typing import ClassVar

import torch

from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision
from coconut_serve.reasoning.slots import Slots
from coconut_serve.types import HaltReason, ReasoningParams


class CotMode(ReasoningMode):
    """Feed each sampled token until it is the end-of-thought token."""

    name: ClassVar[str] = "cot"
    needs_logits: ClassVar[bool] = False
    needs_sampled: ClassVar[bool] = True
    feeds_vectors: ClassVar[bool] = False

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._stop_token = slots.register("cot_stop_token", torch.int64)  # [num_slots], -1 = none

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the end-of-thought token."""
        self._stop_token[slot] = -1 if params.stop_token_id is None else params.stop_token_id

    def decide(self, ctx: StepContext) -> StepDecision:
        """Feed the sampled token; halt when it ends the thought."""
        assert ctx.sampled is not None
        is_stop = ctx.sampled == self._stop_token[ctx.row_slots]
        return StepDecision(token=ctx.sampled, halt=is_stop * int(HaltReason.STOP_TOKEN))
