"""`distribution`: think in soft tokens, as Soft Thinking does."""

from dataclasses import fields
from typing import ClassVar

import torch
from torch import Tensor

from coconut_serve.reasoning import mixing, noise
from coconut_serve.reasoning.mode import ReasoningMode, StepContext, StepDecision
from coconut_serve.reasoning.slots import Slots
from coconut_serve.types import HaltParams, HaltReason, MixtureParams, NoiseKind, ReasoningParams

_NOISE = {"none": 0, "gumbel": 1, "dirichlet": 2}


class DistributionMode(ReasoningMode):
    """Feed the weighted mean of the likeliest tokens' embeddings (arXiv 2505.15778).

    The text of a step is its heaviest token. The phase ends when that token is the end-of-thought
    token, or by Cold Stop: entropy below a threshold for a number of consecutive steps.
    """

    name: ClassVar[str] = "distribution"

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)

        def buffer(name: str, dtype: torch.dtype) -> Tensor:
            return slots.register(f"distribution_{name}", dtype)

        # MixtureParams and HaltParams by slot; each [num_slots].
        self._params = {
            f.name: buffer(f.name, torch.int64 if isinstance(f.default, int) else torch.float32)
            for f in (*fields(MixtureParams), *fields(HaltParams))
            if f.name != "noise"
        }
        self._stop_token = buffer("stop_token", torch.int64)
        self._noise = buffer("noise", torch.int64)
        self._num_cold = buffer("num_cold", torch.int64)  # consecutive steps below the threshold
        # What the host must know to skip work that no row asked for.
        self._host_noise: list[NoiseKind] = ["none"] * slots.num_slots
        self._host_has_cold_stop = [False] * slots.num_slots
        self._host_needs_total = [False] * slots.num_slots

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the mixture and its halting rules."""
        for name, buffer in self._params.items():
            record = params.mixture if hasattr(params.mixture, name) else params.halt
            buffer[slot] = getattr(record, name)
        self._stop_token[slot] = -1 if params.stop_token_id is None else params.stop_token_id
        self._noise[slot] = _NOISE[params.mixture.noise]
        self._num_cold[slot] = 0
        self._host_noise[slot] = params.mixture.noise
        self._host_needs_total[slot] = params.mixture.filter_top_k == 0
        self._host_has_cold_stop[slot] = params.halt.entropy_below > 0.0

    def decide(self, ctx: StepContext) -> StepDecision:
        """Mix the likeliest tokens and check both halting rules."""
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
            vector=mixing.mix_embeddings(weights, ids, ctx.embed_tokens),
            halt=self._halt(ctx, token),
            retained_mass=self._retained(ctx.logits, weights, ids, temperature, total),
        )

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

    def _halt(self, ctx: StepContext, token: Tensor) -> Tensor:
        """Return each row's HaltReason; [num_rows] int64."""
        rows = ctx.row_slots
        assert ctx.logits is not None
        halt = torch.zeros_like(token)
        if any(self._host_has_cold_stop[slot] for slot in ctx.host_slots):
            tempered = ctx.logits / self._params["temperature"][rows].unsqueeze(1)
            entropy = mixing.entropy(tempered.log_softmax(-1))
            is_cold = entropy < self._params["entropy_below"][rows]
            num_cold = torch.where(is_cold, self._num_cold[rows] + 1, 0)
            self._num_cold[rows] = num_cold
            halt = (num_cold >= self._params["entropy_patience"][rows]) * int(HaltReason.COLD_STOP)
        return torch.where(token == self._stop_token[rows], int(HaltReason.STOP_TOKEN), halt)
