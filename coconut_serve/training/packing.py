"""Supervises all targets of a question in one packed forward pass.

After the prompt, the start token and the thoughts, one pass runs several branches side by side:
chain of thought, direct answer, and for each chosen k the text after the first k thoughts. A mask
isolates the branches, and position ids make each one equal to a pass of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor

from coconut_serve.training.model import Cache, Llama, Mixture
from coconut_serve.training.task import Graphs, Ints, cot_ids, frontiers, prompt_ids
from coconut_serve.training.vocabulary import ANSWER, END, FIRST_NAME, START, VOCAB_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Training targets of one batch."""

    stages: Sequence[int]  # thought counts k after which the rest is generated
    num_thoughts: int  # latent slots filled; at least the largest stage
    cot_weight: float = 1.0
    direct_weight: float = 0.3
    frontier_weight: float = 1.0
    is_soft: bool = False  # the slots are fed soft tokens, not hidden states


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Tokens that continue the earlier positions [0, num_seen)."""

    token_ids: Ints  # [batch_size, length + 1], each position learns to predict the next
    num_seen: int
    weight: float

    @property
    def length(self) -> int:
        """Positions in the packed pass."""
        return int(self.token_ids.shape[1]) - 1


def branches(graphs: Graphs, num_prompt: int, objective: Objective) -> Iterator[Branch]:
    """List the branches of the packed pass, which follows prompt, start token and thoughts."""
    cot = cot_ids(graphs)
    if objective.cot_weight:
        yield Branch(token_ids=cot, num_seen=num_prompt, weight=objective.cot_weight)
    if objective.direct_weight:
        answer = np.insert(cot[:, -2:], 0, ANSWER, axis=1)
        yield Branch(token_ids=answer, num_seen=num_prompt, weight=objective.direct_weight)
    for stage in objective.stages:
        rest = np.insert(cot[:, 3 * min(stage, graphs.hops) :], 0, END, axis=1)
        yield Branch(token_ids=rest, num_seen=num_prompt + 1 + stage, weight=1.0)


def packed_loss(model: Llama, graphs: Graphs, objective: Objective) -> Tensor:
    """Compute the loss of one batch of questions.

    Sums each branch's mean cross-entropy times its weight; that of the chain of thought's first
    token, which the prompt predicts, with the weight of one of its tokens; and the thoughts' mean
    divergence from the search frontier.

    Returns:
        A scalar.
    """
    prompt = prompt_ids(graphs)
    size, num_prompt = prompt.shape
    prefix = np.concatenate([prompt, np.full((size, 1), START)], axis=1)
    hidden, cache = model.forward(model.embed(_tensor(prefix, model)))
    mixture = Mixture() if objective.is_soft else None
    thinking = model.think(hidden[:, -1], cache, objective.num_thoughts, mixture)
    packed = list(branches(graphs, num_prompt, objective))
    loss = _branch_loss(model, packed, thinking.cache)
    if objective.cot_weight:
        root = _tensor(graphs.path[:, 0] + FIRST_NAME, model)
        first = F.cross_entropy(model.logits(hidden[:, num_prompt - 1]), root)
        loss = loss + first * objective.cot_weight / (3 * graphs.hops + 3)
    if objective.frontier_weight:
        divergence = frontier_divergence(model, thinking.thoughts, graphs)
        loss = loss + objective.frontier_weight * divergence
    return loss


def _branch_loss(model: Llama, packed: Sequence[Branch], cache: Cache) -> Tensor:
    """Run all branches at once and sum their mean cross-entropies by weight."""
    inputs = _tensor(np.concatenate([b.token_ids[:, :-1] for b in packed], axis=1), model)
    targets = _tensor(np.concatenate([b.token_ids[:, 1:] for b in packed], axis=1), model)
    weights = torch.cat([torch.full((b.length,), b.weight / b.length) for b in packed])
    hidden, _ = model.forward(
        model.embed(inputs),
        cache=cache,
        positions=torch.cat([torch.arange(b.num_seen, b.num_seen + b.length) for b in packed]),
        mask=branch_mask(packed, cache.num_positions).to(model.device),
    )
    logits = model.logits(hidden).flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return losses.view_as(targets).mean(dim=0) @ weights.to(losses)


def branch_mask(packed: Sequence[Branch], num_earlier: int) -> Tensor:
    """Let each packed position attend to its branch's earlier positions and causally to its branch.

    Returns:
        [num_packed, num_earlier + num_packed] bool.
    """
    owner = torch.repeat_interleave(torch.tensor([b.length for b in packed]))
    own = (owner[:, None] == owner).tril()
    earlier = [(torch.arange(num_earlier) < b.num_seen).expand(b.length, -1) for b in packed]
    return torch.cat([torch.cat(earlier), own], dim=1)


def frontier_divergence(model: Llama, thoughts: Tensor, graphs: Graphs) -> Tensor:
    """Compute the mean Kullback-Leibler divergence of the decoded thoughts from the frontiers.

    Args:
        model: Decodes the thoughts.
        thoughts: [batch_size, num_thoughts, hidden_size].
        graphs: The batch.
    """
    target = torch.from_numpy(frontiers(graphs, thoughts.shape[1])).to(thoughts)
    return _divergence(model.logits(thoughts), target)


def lookup_loss(model: Llama, graphs: Graphs, rng: np.random.Generator) -> Tensor:
    """Train edge lookup alone: repeat the edges; each parent must predict its children.

    Returns:
        A scalar, the mean divergence from a uniform distribution over a parent's children.
    """
    told = prompt_ids(graphs)[:, :-5]  # without candidates and root
    size, num_edges = graphs.edges.shape[:2]
    order = rng.random((size, num_edges)).argsort(axis=1)
    edges = told[:, 1:].reshape(size, num_edges, 3)
    again = np.take_along_axis(edges, order[:, :, None], axis=1)
    token_ids = np.concatenate([told, again.reshape(size, -1)], axis=1)
    hidden, _ = model.forward(model.embed(_tensor(token_ids, model)))
    children = np.zeros((size, num_edges, VOCAB_SIZE), dtype=np.float32)
    row, asked, edge = (edges[:, None, :, 0] == again[:, :, None, 0]).nonzero()
    children[row, asked, edges[row, edge, 1]] = 1.0
    target = torch.from_numpy(children / children.sum(axis=2, keepdims=True)).to(hidden)
    return _divergence(model.logits(hidden[:, told.shape[1] :: 3]), target)


def _divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Compute softmax(logits)' mean divergence from target; [batch_size, count, vocab_size]."""
    log_probs = F.log_softmax(logits, dim=-1).flatten(0, 1)
    return F.kl_div(log_probs, target.flatten(0, 1), reduction="batchmean")


def _tensor(array: Ints, model: Llama) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(model.device)
