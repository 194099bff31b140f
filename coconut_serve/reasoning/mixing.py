"""Soft tokens: filter a distribution, add noise, average the embeddings of the likeliest tokens.

Formulas: Soft Thinking (arXiv 2505.15778, section 3) with the order of operations of its public
code; noise as in Stochastic Soft Thinking (arXiv 2508.03440, section 4).
"""

import torch
from torch import Tensor

from coconut_serve.reasoning import noise
from coconut_serve.reasoning.slots import EmbedTokens


def entropy(log_probs: Tensor) -> Tensor:
    """Compute -sum p ln p in nats; [num_rows, vocab_size] float32 -> [num_rows]."""
    probs = log_probs.exp()
    # 0 * -inf is 0 here: an impossible token adds no entropy.
    return -(probs * log_probs.clamp_min(-1e30)).sum(-1)


def total_weight(logits: Tensor, temperature: Tensor) -> Tensor:
    """Sum exp((logit - largest) / temperature) over the vocabulary.

    Args:
        logits: [num_rows, vocab_size] float32.
        temperature: [num_rows] float32.

    Returns:
        [num_rows] float32, the total weight relative to the likeliest token's.
    """
    below = logits - logits.amax(-1, keepdim=True)
    return below.div_(temperature.unsqueeze(1)).exp_().sum(-1)


def filter_candidates(
    logits: Tensor,
    *,
    temperature: Tensor,
    filter_top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    total: Tensor | None,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Keep the likeliest tokens by top-k, then top-p, then min-p, renormalised.

    The tokens that are mixed, or that pass the top-k, are enough candidates for exact results:
    each filter depends only on likelier tokens. After a top-k the rest of the vocabulary does not
    matter, so its softmax is not computed.

    Args:
        logits: [num_rows, vocab_size] float32.
        temperature: [num_rows] float32.
        filter_top_k: [num_rows] int64, 0 = all.
        top_p: [num_rows] float32.
        min_p: [num_rows] float32, relative to the likeliest token.
        total: [num_rows] float32, `total_weight`; needed if any filter_top_k is 0.
        width: Maximum number of candidates.

    Returns:
        Weights [num_rows, width], likeliest first, zero for dropped tokens, and token ids
        [num_rows, width].
    """
    width = min(width, logits.shape[-1])
    values, ids = _top(logits, width)  # both [num_rows, width]
    p = ((values - values[:, :1]) / temperature.unsqueeze(1)).exp()
    rank = torch.arange(width, device=logits.device)
    has_top_k = (filter_top_k > 0).unsqueeze(1)
    p = torch.where(has_top_k & (rank >= filter_top_k.unsqueeze(1)), 0.0, p)
    mass = p.sum(-1, keepdim=True)
    if total is not None:
        mass = torch.where(has_top_k, mass, total.unsqueeze(1))
    p = p / mass
    is_kept = (p.cumsum(-1) - p) < top_p.unsqueeze(1)  # the token that crosses top_p stays
    is_kept &= p >= min_p.unsqueeze(1) * p[:, :1]
    is_kept[:, 0] = True  # however small top_p is
    p = torch.where(is_kept, p, 0.0)
    return p / p.sum(-1, keepdim=True), ids


def filter_vocabulary(p: Tensor, *, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero the probabilities that the filters drop, over the whole vocabulary.

    Args:
        p: [num_rows, vocab_size] float32, each row sums to 1.
        top_k: [num_rows] int64, 0 = all.
        top_p: [num_rows] float32.
        min_p: [num_rows] float32, relative to the likeliest token.

    Returns:
        [num_rows, vocab_size] float32, not renormalised.
    """
    ordered, ids = p.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(p.shape[1], device=p.device)
    top_k, top_p, min_p = (x.unsqueeze(1) for x in (top_k, top_p, min_p))
    kept = torch.where((top_k > 0) & (rank >= top_k), 0.0, ordered)
    is_kept = (kept.cumsum(-1) - kept) < top_p * kept.sum(-1, keepdim=True)
    is_kept &= kept >= min_p * kept[:, :1]
    is_kept[:, 0] = True  # however small top_p is
    return torch.zeros_like(p).scatter(1, ids, torch.where(is_kept, kept, 0.0))


def _top(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Find the `width` largest logits of each row and their ids, by chunks where that is faster.

    The `width` largest lie in at most `width` chunks: those with the largest maxima.
    """
    size = 64
    num_chunks = logits.shape[1] // size
    if logits.is_cuda or num_chunks <= 2 * width:
        return logits.topk(width, dim=-1)
    num_rows, num_whole = len(logits), num_chunks * size
    chunks = logits[:, :num_whole].reshape(-1, size)
    largest = chunks.view(num_rows, num_chunks, size).amax(-1)
    best = largest.topk(width, dim=-1, sorted=False).indices  # [num_rows, width]
    first = torch.arange(num_rows).unsqueeze(1) * num_chunks
    found = chunks.index_select(0, (first + best).flatten()).view(num_rows, -1)
    if num_whole == logits.shape[1]:
        values, at = found.topk(width, dim=-1)
        return values, best.gather(1, at // size) * size + at % size
    values, at = torch.cat([found, logits[:, num_whole:]], dim=1).topk(width, dim=-1)
    chunk = best.gather(1, (at // size).clamp_max(width - 1))
    ids = torch.where(at < width * size, chunk * size + at % size, at + num_whole - width * size)
    return values, ids


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


def gumbel_weights(p: Tensor, temperature: Tensor, u: Tensor, clamp: Tensor) -> Tensor:
    """Perturb weights: softmax((ln p + g) / temperature) over the kept tokens.

    Args:
        p: [num_rows, width] float32.
        temperature: [num_rows] float32.
        u: [num_rows, width], uniform in (0, 1).
        clamp: [num_rows, 2] float32, bounds of g (SofT-GRPO, arXiv 2511.06411).

    Returns:
        [num_rows, width] float32, each row sums to 1.
    """
    g = noise.gumbel(u).clamp(clamp[:, :1], clamp[:, 1:])
    return ((torch.log(p) + g) / temperature.unsqueeze(1)).softmax(-1)


def keep_first(p: Tensor, top_k: Tensor) -> Tensor:
    """Zero all but the first `top_k` weights of each row and renormalise.

    Args:
        p: [num_rows, width] float32, heaviest first.
        top_k: [num_rows] int64.

    Returns:
        [num_rows, width] float32.
    """
    rank = torch.arange(p.shape[1], device=p.device)
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
