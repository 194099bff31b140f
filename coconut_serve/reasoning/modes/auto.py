"""`auto`: think in tokens or soft tokens, depending on entropy or confidence."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from coconut_serve.params import ReasoningParams, SwitchParams
from coconut_serve.reasoning import mixing
from coconut_serve.reasoning.mixers import Mixers
from coconut_serve.reasoning.mode import ReasoningMode, Soft, StepContext, StepDecision, merge
from coconut_serve.reasoning.plan import StepClass
from coconut_serve.reasoning.settings import choice
from coconut_serve.reasoning.slots import Slots
from coconut_serve.types import HaltReason

_FIRST_BLEND = 0.1  # share of the newline's embedding in the first soft input
_SAY_END, _LEAVE = 1, 2  # what the next decision must do after a switch over budget

_SWI, _NONE = (choice(SwitchParams, "rule", name) for name in ("swi", "none"))
_CONFIDENT = choice(SwitchParams, "soft_when", "confident")


class AutoMode(ReasoningMode):
    """Switch between the sampled token and a soft one.

    `swi` (SwiReasoning, arXiv 2510.05069, as in its code): starts soft; switches to tokens when the
    entropy falls below that of the last switch, and back when it rises above it and `window` steps
    have passed; a sampled </think> locks the row in tokens. `confidence` (ThinkRouter, arXiv
    2602.11683): soft when the likeliest token's probability reaches `p_max`, or when it does not.
    `none`: always soft. The text of every step is the sampled token.

    With a budget of C switches, swi forces </think> in the step after each switch to tokens from
    the C-th to the 2 C-th; a later one ends the phase. Without a </think> token, the C-th ends it.
    A forced </think> does not lock the row, but it can end the phase like a sampled one.
    """

    name: ClassVar[str] = "auto"

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._mixers = Mixers()
        self._is_soft = slots.register("auto_is_soft", torch.bool, start=True)
        self._stay = slots.register("auto_stay", torch.int64)  # steps since the last switch
        self._reference = slots.register("auto_reference", torch.float32)  # entropy at that switch
        self._num_switches = slots.register("auto_num_switches", torch.int64)  # soft to tokens
        self._is_locked = slots.register("auto_is_locked", torch.bool)  # stays in tokens
        self._pending = slots.register("auto_pending", torch.int64)  # _SAY_END, _LEAVE or 0

    @classmethod
    def needs_sampled(cls, params: ReasoningParams) -> bool:
        return True

    @classmethod
    def step_class(cls, params: ReasoningParams) -> StepClass:
        return params.switch.rule, *Mixers.step_class(params.mixture)

    def decide(self, ctx: StepContext) -> StepDecision:
        is_swi = ctx.host.rule == _SWI
        if is_swi.all():
            return self._swi(ctx)
        if not is_swi.any():
            return self._confidence(ctx)
        parts = []
        for wanted, rule in ((True, self._swi), (False, self._confidence)):
            part, at = ctx.select([i for i, each in enumerate(is_swi) if each == wanted])
            parts.append((at, rule(part)))
        return merge(parts, ctx.hidden)

    def _confidence(self, ctx: StepContext) -> StepDecision:
        """Choose soft or hard by the likeliest token's probability in the raw distribution."""
        assert ctx.raw_logits is not None
        mixed = self._mixers.mix(ctx)
        settings = ctx.settings
        is_always = settings.rule == _NONE  # whatever the probability
        least = torch.where(is_always, 0.0, settings.p_max)
        is_sure = ctx.raw_logits.softmax(-1).amax(-1) >= least
        is_soft = is_sure == (is_always | (settings.soft_when == _CONFIDENT))
        is_first = self.slots.num_decisions[ctx.row_slots] == 0
        was_soft, self._is_soft[ctx.row_slots] = self._is_soft[ctx.row_slots], is_soft
        is_switch = (is_soft != was_soft) & ~is_first
        return replace(mixed, token=ctx.sampled, is_vector=is_soft, is_switch=is_switch)

    def _swi(self, ctx: StepContext) -> StepDecision:
        """Choose soft or hard by the entropy of the raw distribution."""
        assert ctx.raw_logits is not None
        rows, log_probs = ctx.row_slots, ctx.raw_logits.log_softmax(-1)
        is_first = self.slots.num_decisions[rows] == 0
        end, pending = ctx.settings.end_token_id, self._pending[rows]
        # Only a sampled </think> locks: a forced one would stop the count of switches.
        self._is_locked[rows] |= (ctx.sampled == end) & (end >= 0)
        ctx = replace(ctx, sampled=torch.where(pending == _SAY_END, end, ctx.sampled))
        to_hard, to_soft = self._switch(ctx, mixing.entropy(log_probs), is_first)
        blends = to_hard & (end >= 0)

        def blend(means: Tensor) -> Tensor:
            soft = means.float()
            vector = self._blend(ctx, soft, blends=blends, to_soft=to_soft, is_first=is_first)
            return vector.to(ctx.hidden.dtype)

        is_hard_token = (ctx.sampled.unsqueeze(1) == ctx.settings.hard_token_ids).any(1)
        is_soft = self._is_soft[rows] & ~is_hard_token
        self._pending[rows] = self._exceed(ctx, to_hard, has_end=end >= 0)
        return StepDecision(
            token=ctx.sampled,
            vector=Soft(log_probs.exp(), blend),
            is_vector=is_soft | blends,
            is_switch=to_hard | to_soft,
            halt=(pending == _LEAVE) * int(HaltReason.SWITCHES),
        )

    def _exceed(self, ctx: StepContext, to_hard: Tensor, *, has_end: Tensor) -> Tensor:
        """Return what this switch makes the next decision do; [num_rows] int64."""
        budget, count = ctx.settings.max_switches, self._num_switches[ctx.row_slots]
        is_over = to_hard & (budget > 0) & (count >= budget)
        leaves = (count > 2 * budget) | ~has_end
        return is_over * torch.where(leaves, _LEAVE, _SAY_END)

    def _switch(self, ctx: StepContext, entropy: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
        """Advance the state machine; return which rows switch to tokens and which to soft."""
        rows = ctx.row_slots
        reference, is_soft = self._reference[rows], self._is_soft[rows]
        stay = torch.where(is_first, 0, self._stay[rows] + 1)
        to_hard = ~is_first & is_soft & (entropy < reference)
        has_stayed = stay >= ctx.settings.window
        is_locked = self._is_locked[rows]
        to_soft = ~is_first & ~is_soft & (entropy > reference) & has_stayed & ~is_locked
        moves = to_hard | to_soft
        self._is_soft[rows] = ((is_soft & ~to_hard) | to_soft) & ~is_locked
        self._stay[rows] = torch.where(moves, 0, stay)
        self._reference[rows] = torch.where(is_first | moves, entropy, reference)
        self._num_switches[rows] += to_hard.to(torch.int64)
        return to_hard, to_soft

    def _blend(
        self, ctx: StepContext, soft: Tensor, *, blends: Tensor, to_soft: Tensor, is_first: Tensor
    ) -> Tensor:
        """Mix the think tokens in at switches and a newline at the start.

        Args:
            ctx: The rows.
            soft: [num_rows, hidden_size] float32, the means.
            blends: [num_rows] bool, rows that switch to tokens and feed a blend with </think>.
            to_soft: [num_rows] bool.
            is_first: [num_rows] bool.

        Returns:
            The inputs of soft rows and of rows at a switch, [num_rows, hidden_size] float32.
        """
        settings = ctx.settings  # `steps` are those of the whole phase
        progress = self.slots.num_decisions[ctx.row_slots] / settings.steps.clamp_min(1).float()

        def mark(token: Tensor) -> tuple[Tensor, Tensor]:  # -1: the model has none
            return ctx.embedding(token.clamp_min(0)).float(), token >= 0

        def mix(vector: Tensor, other: Tensor, share: Tensor, where: Tensor) -> Tensor:
            share = torch.where(where, share, 1.0).unsqueeze(1)
            return share * vector + (1.0 - share) * other

        alpha, beta = settings.alpha, settings.beta
        think, has_think = mark(settings.think_token_id)
        end, _ = mark(settings.end_token_id)
        newline, has_newline = mark(settings.newline_token_id)
        soft = mix(soft, think, alpha + (1 - alpha) * progress, to_soft & has_think)
        first = torch.full_like(alpha, 1.0 - _FIRST_BLEND)
        soft = mix(soft, newline, first, is_first & has_newline)
        hard = mix(ctx.embedding(ctx.sampled).float(), end, beta + (1 - beta) * progress, blends)
        return torch.where(blends.unsqueeze(1), hard, soft)
