"""`distribution`: think in soft tokens."""

from typing import ClassVar

import torch
from torch import Tensor

from coconut_serve.reasoning.mixers import KINDS, Mixed, Mixing, Mixtures
from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision, Thought
from coconut_serve.reasoning.slots import Slots
from coconut_serve.types import ReasoningParams


class DistributionMode(ReasoningMode):
    """Feed an average of embeddings (Soft Thinking, arXiv 2505.15778, and its relatives).

    mixers.py makes the average, halting.py ends the phase.
    """

    name: ClassVar[str] = "distribution"

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._mixtures = Mixtures(slots, "distribution")
        self._mixers = {name: kind(self._mixtures) for name, kind in KINDS.items()}
        self._mean_norm: Tensor | None = None  # [] float32, of an embedding

    @classmethod
    def needs_sampled(cls, params: ReasoningParams) -> bool:
        """Only mixtures with the sampled token draw one."""
        return KINDS[params.mixture.kind].needs_sampled

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the mixture."""
        self._mixtures.admit(slot, params)

    def decide(self, ctx: StepContext) -> Thought:
        """Mix, each kind of mixture for all its rows at once."""
        kinds: list[str] = [mixture.kind for mixture in self._mixtures.each(ctx)]
        if len(set(kinds)) == 1:
            mixed = yield from self._mix(ctx, kinds[0])
        else:
            mixed = yield from self._mix_several(ctx, kinds)
        return StepDecision(
            token=mixed.token, vector=self._scale(ctx, mixed), retained_mass=mixed.retained_mass
        )

    def _mix(self, ctx: StepContext, kind: str) -> Mixing:
        mixed = self._mixers[kind].mix(ctx)
        return mixed if isinstance(mixed, Mixed) else (yield from mixed)

    def _mix_several(self, ctx: StepContext, kinds: list[str]) -> Mixing:
        """Let each kind do its rows and put them together."""
        rows = ctx.row_slots
        token, mass = torch.zeros_like(rows), torch.ones(len(kinds), device=rows.device)
        vector, retained = torch.empty_like(ctx.hidden), torch.ones_like(mass)
        for kind in sorted(set(kinds)):
            part, at = ctx.select([i for i, each in enumerate(kinds) if each == kind])
            mixed = yield from self._mix(part, kind)
            token[at], mass[at] = mixed.token, mixed.square_mass
            vector[at] = mixed.vector.to(vector.dtype)
            if mixed.retained_mass is not None:
                retained[at] = mixed.retained_mass
        return Mixed(token=token, vector=vector, square_mass=mass, retained_mass=retained)

    def _scale(self, ctx: StepContext, mixed: Mixed) -> Tensor:
        """Give vectors the length that `norm` asks for."""
        norms = [mixture.norm for mixture in self._mixtures.each(ctx)]
        if set(norms) == {"none"}:
            return mixed.vector
        vector = mixed.vector.float()
        if self._mean_norm is None:
            assert ctx.logits is not None
            ids = torch.arange(ctx.logits.shape[1], device=vector.device)
            self._mean_norm = ctx.embedding.mean_norm(ids)
        scales = {
            "none": torch.ones_like(mixed.square_mass),
            "l2": mixed.square_mass.rsqrt(),
            "embed_mean": self._mean_norm / vector.norm(dim=-1).clamp_min(1e-12),
        }
        scale = torch.stack([scales[norm][i] for i, norm in enumerate(norms)])
        return (vector * scale.unsqueeze(1)).to(mixed.vector.dtype)
