"""Mixtures that a soft step can feed. A new one is a class and a line in KINDS.

Each processes all its rows at once.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from coconut_serve.params import MAX_MIXTURE_TOP_K, MixtureParams
from coconut_serve.reasoning import mixing, noise
from coconut_serve.reasoning.adapters import Gate
from coconut_serve.reasoning.mode import Soft, StepContext, StepDecision, merge
from coconut_serve.reasoning.settings import choice
from coconut_serve.reasoning.slots import upload

_NOISE = {name: choice(MixtureParams, "noise", name) for name in ("gumbel", "dirichlet")}
_NORM = {name: choice(MixtureParams, "norm", name) for name in ("none", "l2", "embed_mean")}
_EQUAL = choice(MixtureParams, "weights", "equal")
_FEW_MIXED = 16  # tokens looked up for rows that mix no more
_FEW_CANDIDATES = 32  # tokens searched for rows whose top-k passes no more


def _or_all(number: int, few: int) -> int:
    """Round a number of tokens up to `few` or to the maximum."""
    return few if number <= few else MAX_MIXTURE_TOP_K


class Mixer(ABC):
    """One way to make an input vector from a distribution."""

    needs_sampled: ClassVar[bool] = False  # the sampled token is mixed in

    @classmethod
    def sizes(cls, mixture: MixtureParams) -> tuple[int, ...]:
        """Return the widths of a row's tensors; rows with different widths are mixed separately.

        They depend only on the row's own settings, so the rest of the batch changes neither how
        ties are ordered nor how sums are rounded.
        """
        return ()

    @abstractmethod
    def mix(self, ctx: StepContext) -> StepDecision:
        """Decide each row; all have the same `sizes`."""

    def _sizes(self, ctx: StepContext) -> tuple[int, ...]:
        return self.sizes(ctx.params[0].mixture)

    def _scale(
        self,
        ctx: StepContext,
        vector: Tensor | Soft,
        weights: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Tensor | Soft:
        """Scale vectors as the setting `norm` asks.

        Args:
            ctx: The rows.
            vector: [num_rows, hidden_size].
            weights: [num_rows, width], of the mixed tokens; None: `norm` l2 changes nothing.
            ids: [num_rows, width], if a token may occur twice: its weights add up.
        """
        if (ctx.host.norm == _NORM["none"]).all():
            return vector
        assert ctx.logits is not None
        norm, device = ctx.settings.norm, ctx.hidden.device
        mean_norm = ctx.embedding.mean_norm_of_all(ctx.logits.shape[1], device)
        ones = torch.ones(len(norm), device=device)
        l2 = ones if weights is None else _square_mass(weights, ids).rsqrt()

        def scale(fed: Tensor) -> Tensor:
            whole = fed.float()
            lengths = mean_norm / whole.norm(dim=-1).clamp_min(1e-12)
            factor = torch.where(norm == _NORM["l2"], l2, ones)
            factor = torch.where(norm == _NORM["embed_mean"], lengths, factor)
            return (whole * factor.unsqueeze(1)).to(fed.dtype)

        return vector.then(scale) if isinstance(vector, Soft) else scale(vector)

    def _tempered(self, ctx: StepContext) -> Tensor:
        """Divide the logits by the mixture's temperature."""
        assert ctx.logits is not None
        return ctx.logits / ctx.settings.temperature.unsqueeze(1)


def _square_mass(weights: Tensor, ids: Tensor | None) -> Tensor:
    """Sum the squared weights of each row; arguments as in Mixer._scale; [num_rows]."""
    if ids is None:
        return weights.square().sum(-1)
    is_same = ids.unsqueeze(2) == ids.unsqueeze(1)  # [num_rows, width, width]
    return (is_same * weights.unsqueeze(2) * weights.unsqueeze(1)).sum((1, 2))


class TopK(Mixer):
    """The likeliest tokens by probability, with optional noise (Soft Thinking, arXiv 2505.15778).

    The text of a step is its heaviest token.
    """

    @classmethod
    def sizes(cls, mixture: MixtureParams) -> tuple[int, int]:
        """Return the numbers of candidates and of mixed tokens."""
        passing = mixture.filter_top_k or MAX_MIXTURE_TOP_K
        num_mixed = min(passing, mixture.top_k)
        return _or_all(passing, _FEW_CANDIDATES), _or_all(num_mixed, _FEW_MIXED)

    def mix(self, ctx: StepContext) -> StepDecision:
        assert ctx.logits is not None
        settings, temperature = ctx.settings, ctx.settings.temperature
        num_candidates, num_mixed = self._sizes(ctx)
        total = None
        if ctx.has_trace or (ctx.host.filter_top_k == 0).any():
            total = mixing.total_weight(ctx.logits, temperature)
        kept, ids = mixing.filter_candidates(
            ctx.logits,
            temperature=temperature,
            filter_top_k=settings.filter_top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            total=total,
            width=num_candidates,
        )
        weights, ids = self._add_noise(ctx, kept, ids)
        weights, ids = weights[:, :num_mixed], ids[:, :num_mixed]
        retained = None
        if total is not None:
            below = ctx.logits.gather(1, ids) - ctx.logits.amax(-1, keepdim=True)
            p = (below / temperature.unsqueeze(1)).exp() / total.unsqueeze(1)
            retained = torch.where(weights > 0, p, 0.0).sum(-1)
        return StepDecision(
            token=ids.gather(1, weights.argmax(-1, keepdim=True)).squeeze(1),
            vector=self._scale(ctx, mixing.mix_embeddings(weights, ids, ctx.embedding), weights),
            retained_mass=retained,
        )

    def _add_noise(self, ctx: StepContext, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the `top_k` heaviest, with Dirichlet noise before and Gumbel noise after.

        Weights and tokens come heaviest first; nonzero weights stay in front.
        """
        rows, slots, settings = ctx.row_slots, ctx.slots, ctx.settings
        asked, kind = ctx.host.noise, settings.noise.unsqueeze(1)  # [num_rows, 1]
        if (asked == _NOISE["dirichlet"]).any():
            seed, counter = slots.seed[rows], slots.num_decisions[rows]
            alpha = settings.dirichlet_alpha
            drawn = mixing.dirichlet_weights(weights, ids, alpha, seed, counter)
            drawn, order = drawn.sort(dim=-1, descending=True, stable=True)
            is_drawn = kind == _NOISE["dirichlet"]
            weights = torch.where(is_drawn, drawn, weights)
            ids = torch.where(is_drawn, ids.gather(1, order), ids)
        weights = mixing.keep_first(weights, settings.top_k)
        if (asked == _NOISE["gumbel"]).any():
            u = ctx.uniform(noise.GUMBEL_STREAM, ids)
            low, high = settings.noise_clamp.unbind(1)  # NaN: no bound
            clamp = torch.stack([low.nan_to_num(-torch.inf), high.nan_to_num(torch.inf)], dim=1)
            drawn = mixing.gumbel_weights(weights, settings.noise_temperature, u, clamp)
            weights = torch.where(kind == _NOISE["gumbel"], drawn, weights)
        return weights, ids


class Full(Mixer):
    """The whole vocabulary, in one matrix product (Soft Tokens, arXiv 2509.19170)."""

    def mix(self, ctx: StepContext) -> StepDecision:
        probs = self._tempered(ctx).softmax(-1)
        vector = self._scale(ctx, Soft(probs, lambda means: means), probs)
        return StepDecision(token=probs.argmax(-1), vector=vector)


class Multiplex(Mixer):
    """Several sampled tokens merged into one input (Multiplex Thinking, arXiv 2601.08808).

    It takes `top_k` samples; the text of a step is the first.
    """

    @classmethod
    def sizes(cls, mixture: MixtureParams) -> tuple[int]:
        return (_or_all(mixture.top_k, _FEW_MIXED),)

    def mix(self, ctx: StepContext) -> StepDecision:
        host, settings = ctx.host, ctx.settings
        weights = self._tempered(ctx).softmax(-1)
        if (host.filter_top_k > 0).any() or (host.top_p < 1).any() or (host.min_p > 0).any():
            weights = mixing.filter_vocabulary(
                weights, top_k=settings.filter_top_k, top_p=settings.top_p, min_p=settings.min_p
            )
        width = min(*self._sizes(ctx), weights.shape[1])
        ids = self._draw(ctx, weights, width)
        if not host.replacement.all():
            distinct = self._draw_distinct(ctx, weights, width)
            ids = torch.where(settings.replacement.unsqueeze(1), ids, distinct)
        shares = weights.gather(1, ids)
        is_equal = settings.weights == _EQUAL
        # If the filters leave too few tokens, some of the draws are tokens they dropped.
        shares = torch.where(is_equal.unsqueeze(1) & (shares > 0), 1.0, shares)
        rank = torch.arange(width, device=ids.device)
        shares = torch.where(rank < settings.top_k.unsqueeze(1), shares, 0.0)
        shares = shares / shares.sum(-1, keepdim=True)
        vector = mixing.mix_embeddings(shares, ids, ctx.embedding)
        return StepDecision(token=ids[:, 0], vector=self._scale(ctx, vector, shares, ids))

    def _draw(self, ctx: StepContext, weights: Tensor, width: int) -> Tensor:
        """Draw with replacement; [num_rows, width] int64."""
        columns = torch.arange(width, device=weights.device).unsqueeze(0)
        u = ctx.uniform(noise.DRAW_STREAM, columns)
        cumulative = weights.double().cumsum(-1)
        targets = u.double() * cumulative[:, -1:]
        found = torch.searchsorted(cumulative, targets, right=True)
        return found.clamp_max(weights.shape[1] - 1)

    def _draw_distinct(self, ctx: StepContext, weights: Tensor, width: int) -> Tensor:
        """Draw without replacement: the largest of ln w + Gumbel noise (Kool et al., 2019)."""
        ids = torch.arange(weights.shape[1], device=weights.device).unsqueeze(0)
        u = ctx.uniform(noise.DRAW_STREAM, ids)
        return (weights.log() + noise.gumbel(u)).topk(width, dim=-1).indices


class MixtureOfInputs(Mixer):
    """The sampled token blended with the distribution (MoI, arXiv 2505.14827).

    w = (H p + (beta + 1 - H) onehot(y)) / (beta + 1), with p over the `top_k` likeliest tokens and
    H its entropy divided by ln top_k. A negative beta feeds p alone.
    """

    needs_sampled = True

    @classmethod
    def sizes(cls, mixture: MixtureParams) -> tuple[int]:
        return (_or_all(mixture.top_k, _FEW_CANDIDATES),)

    def mix(self, ctx: StepContext) -> StepDecision:
        assert ctx.logits is not None
        (width,) = self._sizes(ctx)
        count = ctx.settings.top_k
        ones, zeros = torch.ones_like(count.float()), torch.zeros_like(count.float())
        p, ids = mixing.filter_candidates(
            ctx.logits, temperature=ctx.settings.temperature, filter_top_k=count,
            top_p=ones, min_p=zeros, total=None, width=width,
        )  # fmt: skip
        entropy = mixing.entropy(p.clamp_min(1e-38).log())
        share = (entropy / count.float().log().clamp_min(1e-9)).unsqueeze(1)
        beta = ctx.settings.moi_beta.unsqueeze(1)
        soft = torch.where(beta < 0, 1.0, share / (beta + 1.0))
        hard = torch.where(beta < 0, 0.0, 1.0 - soft)
        weights = torch.cat([soft * p, hard], dim=1)
        ids = torch.cat([ids, ctx.sampled.unsqueeze(1)], dim=1)
        vector = mixing.mix_embeddings(weights, ids, ctx.embedding)
        return StepDecision(token=ctx.sampled, vector=self._scale(ctx, vector, weights, ids))


class Gated(Mixer):
    """A learned gate mixes the sampled token's embedding and p E / |p| (HRPO, 2505.18454)."""

    needs_sampled = True

    def mix(self, ctx: StepContext) -> StepDecision:
        probs = self._tempered(ctx).softmax(-1)

        def gate(means: Tensor) -> Tensor:
            soft = means.float() / probs.norm(dim=-1, keepdim=True)
            token = ctx.embedding(ctx.sampled)
            vector = token.float()
            names = [params.adapter for params in ctx.params]
            for name in sorted(set(names)):
                adapter = ctx.adapters[name]
                assert isinstance(adapter, Gate), "the service lets no other adapter through"
                rows = upload([i for i, each in enumerate(names) if each == name], vector.device)
                vector = vector.index_copy(0, rows, adapter.mix(vector[rows], soft[rows]))
            return vector.to(token.dtype)

        return StepDecision(token=ctx.sampled, vector=self._scale(ctx, Soft(probs, gate)))


KINDS: dict[str, type[Mixer]] = {
    "topk": TopK,
    "full": Full,
    "multiplex": Multiplex,
    "moi": MixtureOfInputs,
    "gated": Gated,
}


class Mixers:
    """Mixes rows of any kinds, all rows of one kind at once."""

    def __init__(self) -> None:
        self._mixers = {name: kind() for name, kind in KINDS.items()}

    @staticmethod
    def step_class(mixture: MixtureParams) -> tuple[str, tuple[int, ...]]:
        """Return the kind and its sizes; rows that differ in these are mixed separately."""
        return mixture.kind, KINDS[mixture.kind].sizes(mixture)

    def mix(self, ctx: StepContext) -> StepDecision:
        """Mix the rows by kind and sizes."""
        kinds = [self.step_class(params.mixture) for params in ctx.params]
        if len(set(kinds)) == 1:
            return self._mixers[kinds[0][0]].mix(ctx)
        parts = []
        for kind in sorted(set(kinds)):
            part, at = ctx.select([i for i, each in enumerate(kinds) if each == kind])
            parts.append((at, self._mixers[kind[0]].mix(part)))
        return merge(parts, ctx.hidden)
