"""`distribution`: think in soft tokens, as Soft Thinking does."""

from dataclasses import fields
from typing import ClassVar

import torch
from torch import Tensor

from coconut_serve.reasoning import mixing, noise
from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision
from coconut_serve.reasoning.slots import Slots, upload
from coconut_serve.types import MixtureParams, NoiseKind, ReasoningParams

_FEW = 16  # rows that mix no more tokens than that look up no more
_NOISE = {"none": 0, "gumbel": 1, "dirichlet": 2}


class DistributionMode(ReasoningMode):
    """Feed the weighted mean of the likeliest tokens' embeddings (arXiv 2505.15778).

    The text of a step is its heaviest token; halting.py ends the phase.
    """

    name: ClassVar[str] = "distribution"

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)

        def buffer(name: str, dtype: torch.dtype) -> Tensor:
            return slots.register(f"distribution_{name}", dtype)

        # MixtureParams by slot; each [num_slots].
        self._params = {
            f.name: buffer(f.name, torch.int64 if isinstance(f.default, int) else torch.float32)
            for f in fields(MixtureParams)
            if f.name != "noise"
        }
        self._noise = buffer("noise", torch.int64)
        # What the host must know to skip work that no row asked for.
        self._host_noise: list[NoiseKind] = ["none"] * slots.num_slots
        self._host_needs_total = [False] * slots.num_slots
        self._host_top_k = [0] * slots.num_slots

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the mixture."""
        for name, buffer in self._params.items():
            buffer[slot] = getattr(params.mixture, name)
        self._noise[slot] = _NOISE[params.mixture.noise]
        self._host_noise[slot] = params.mixture.noise
        self._host_top_k[slot] = params.mixture.top_k
        self._host_needs_total[slot] = params.mixture.filter_top_k == 0

    def decide(self, ctx: StepContext) -> StepDecision:
        """Mix the likeliest tokens."""
        assert ctx.logits is not None
        rows = ctx.row_slots
        temperature, filter_top_k = self._params["temperature"][rows], self._params["filter_top_k"]
        total = None
        if ctx.has_trace or any(self._host_needs_total[slot] for slot in ctx.host_slots):
            total = mixing.total_weight(ctx.logits, temperature)
        kept, ids = mixing.filter_candidates(
            ctx.logits,
            temperature=temperature,
            filter_top_k=filter_top_k[rows],
            top_p=self._params["top_p"][rows],
            min_p=self._params["min_p"][rows],
            total=total,
        )
        weights = self._add_noise(ctx, kept, ids)
        token = ids.gather(1, weights.argmax(-1, keepdim=True)).squeeze(1)
        return StepDecision(
            token=token,
            vector=self._mix(ctx, weights, ids),
            retained_mass=self._retained(ctx.logits, weights, ids, temperature, total),
        )

    def _mix(self, ctx: StepContext, weights: Tensor, ids: Tensor) -> Tensor:
        """Average embeddings, looking up no more than a row's `top_k` asks for, by size class.

        A row's class depends on its own settings alone, and so does how its sum is rounded.
        """
        is_small = [self._host_top_k[slot] <= _FEW for slot in ctx.host_slots]
        if all(is_small):
            return mixing.mix_embeddings(*mixing.heaviest(weights, ids, _FEW), ctx.embedding)
        mixed = mixing.mix_embeddings(weights, ids, ctx.embedding)
        few = [i for i, each in enumerate(is_small) if each]
        if few:
            rows = upload(few, ids.device)
            kept = mixing.heaviest(weights[rows], ids[rows], _FEW)
            mixed[rows] = mixing.mix_embeddings(*kept, ctx.embedding)
        return mixed

    def _retained(
        self,
        logits: Tensor,
        weights: Tensor,
        ids: Tensor,
        temperature: Tensor,
        total: Tensor | None,
    ) -> Tensor | None:
        """The probability that the mixed tokens cover; [num_rows], for traces alone."""
        if total is None:
            return None
        below = logits.gather(1, ids) - logits.amax(-1, keepdim=True)
        p = (below / temperature.unsqueeze(1)).exp() / total.unsqueeze(1)
        return torch.where(weights > 0, p, 0.0).sum(-1)

    def _add_noise(self, ctx: StepContext, weights: Tensor, ids: Tensor) -> Tensor:
        """Cut to the `top_k` heaviest, with Dirichlet noise before and Gumbel noise after."""
        rows, slots = ctx.row_slots, self.slots
        kinds = {self._host_noise[slot] for slot in ctx.host_slots}
        kind = self._noise[rows].unsqueeze(1)  # [num_rows, 1]
        if "dirichlet" in kinds:
            seed, counter = slots.seed[rows], slots.num_decisions[rows]
            drawn = mixing.dirichlet_weights(
                weights, ids, self._params["dirichlet_alpha"][rows], seed, counter
            )
            weights = torch.where(kind == _NOISE["dirichlet"], drawn, weights)
        weights = mixing.keep_top(weights, self._params["top_k"][rows])
        if "gumbel" in kinds:
            u = ctx.uniform(noise.GUMBEL_STREAM, ids)
            drawn = mixing.gumbel_weights(weights, self._params["noise_temperature"][rows], u)
            weights = torch.where(kind == _NOISE["gumbel"], drawn, weights)
        return weights
