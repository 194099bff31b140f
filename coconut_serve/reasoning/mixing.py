"""Soft tokens: filter a distribution, add noise, average the embeddings of the likeliest tokens.

Formulas: Soft Thinking (arXiv 2505.15778, section 3) with the order of operations of its public
code; noise as in Stochastic Soft Thinking (arXiv 2508.03440, section 4).
"""

import torch
from torch import Tensor

from coconut_serve.reasoning import noise
from coconut_serve.reasoning.slots import EmbedTokens
from coconut_serve.types import MAX_MIXTURE_TOP_K


def entropy(log_probs: Tensor) -> Tensor:
    """Compute -sum p ln p in nats; [num_rows, vocab_size] float32 -> [num_rows]."""
    probs = log_probs.exp()
    # 0 * -inf is 0 here: a token that cannot come adds no entropy.
    return -(probs * log_probs.clamp_min(-1e30)).sum(-1)


def filter_candidates(
    probs: Tensor, *, filter_top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Keep the likeliest tokens by top-k, then top-p, then min-p, renormalised.

    MAX_MIXTURE_TOP_K candidates are enough for exact results: no more than that many are mixed,
    and each filter looks only at likelier tokens.

    Args:
        probs: [num_rows, vocab_size] float32, each row sums to 1.
        filter_top_k: [num_rows] int64, 0 = all.
        top_p: [num_rows] float32.
        min_p: [num_rows] float32, relative to the likeliest token.

    Returns:
        Weights [num_rows, width], likeliest first, zero for dropped tokens, and token ids
        [num_rows, width].
    """
    width = min(MAX_MIXTURE_TOP_K, probs.shape[-1])
    p, ids = probs.topk(width, dim=-1)  # both [num_rows, width]
    rank = torch.arange(width, device=probs.device)
    has_top_k = (filter_top_k > 0).unsqueeze(1)
    p = torch.where(has_top_k & (rank >= filter_top_k.unsqueeze(1)), 0.0, p)
    mass = torch.where(has_top_k, p.sum(-1, keepdim=True), 1.0)
    p = p / mass
    is_kept = (p.cumsum(-1) - p) < top_p.unsqueeze(1)  # the token that crosses top_p stays
    is_kept &= p >= min_p.unsqueeze(1) * p[:, :1]
    is_kept[:, 0] = True  # however small top_p is
    p = torch.where(is_kept, p, 0.0)
    return p / p.sum(-1, keepdim=True), ids


def dirichlet_weights(
    p: Tensor, ids: Tensor, alpha: Tensor, seed: Tensor, counter: Tensor
) -> Tensor:
    """Draw w ~ Dirichlet(alpha * p) over the kept tokens; zero weights stay zero.

    Args:
        p: [num_rows, width] float32.
        ids: [num_rows, width] int64, the tokens; noise belongs to a token, not to its rank.
        alpha: [num_rows] float32.
        seed: [num_rows] int64.
        counter: [num_rows] int64.

    Returns:
        [num_rows, width] float32, each row sums to 1.
    """
    shape = (alpha.unsqueeze(1) * p).clamp_min(1e-6)
    log_draw = noise.log_gamma_draw(shape, seed, counter, ids)
    return torch.where(p > 0, log_draw, -torch.inf).softmax(-1)


def gumbel_weights(p: Tensor, temperature: Tensor, u: Tensor) -> Tensor:
    """Perturb weights: softmax((ln p + g) / temperature) over the kept tokens.

    Args:
        p: [num_rows, width] float32.
        temperature: [num_rows] float32.
        u: [num_rows, width] uniform numbers.

    Returns:
        [num_rows, width] float32, each row sums to 1.
    """
    return ((torch.log(p) + noise.gumbel(u)) / temperature.unsqueeze(1)).softmax(-1)


def keep_top(p: Tensor, top_k: Tensor) -> Tensor:
    """Zero all but the `top_k` largest weights of each row and renormalise.

    Args:
        p: [num_rows, width] float32, in any order.
        top_k: [num_rows] int64.

    Returns:
        [num_rows, width] float32.
    """
    order = p.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    kept = torch.where(rank < top_k.unsqueeze(1), p, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def mix_embeddings(weights: Tensor, ids: Tensor, embed_tokens: EmbedTokens) -> Tensor:
    """Average embeddings by weight.

    Args:
        weights: [num_rows, width] float32, each row sums to 1.
        ids: [num_rows, width] int64.
        embed_tokens: The model's own embedding call.

    Returns:
        [num_rows, hidden_size] in the embedding's dtype; the sum is taken in float32.
    """
    rows = embed_tokens(ids)  # [num_rows, width, hidden_size]
    mixed = torch.bmm(weights.unsqueeze(1), rows.float()).squeeze(1)
    return mixed.to(rows.dtype)
