"""The packed pass gives what separate passes over each sequence give."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor

from coconut_serve.training.initial import initial_weights
from coconut_serve.training.model import Llama, Mixture
from coconut_serve.training.packing import Objective, lookup_loss, packed_loss
from coconut_serve.training.task import Graphs, cot_ids, frontiers, prompt_ids
from coconut_serve.training.vocabulary import ANSWER, END, FIRST_NAME, START, VOCAB_SIZE

pytestmark = pytest.mark.torch


@pytest.fixture
def model() -> Llama:
    return Llama({k: w.double() for k, w in initial_weights(3, has_prior=True).items()})


def spelled_loss(model: Llama, graphs: Graphs, objective: Objective) -> Tensor:
    """Row by row and branch by branch, each sequence computed whole."""
    losses = [row_loss(model, graphs, row, objective) for row in range(len(graphs))]
    return torch.stack(losses).mean()


def row_loss(model: Llama, graphs: Graphs, row: int, objective: Objective) -> Tensor:
    hops = graphs.hops
    prompt = model.embed(torch.from_numpy(prompt_ids(graphs)[row]))
    cot = cot_ids(graphs)[row].tolist()

    def last_hidden(inputs: Tensor) -> Tensor:
        return model.forward(inputs[None])[0][0, -1]

    def mean_loss(before: Tensor, tokens: Sequence[int]) -> Tensor:
        """Of each token but the first, given what comes before it."""
        inputs = torch.cat([before, model.embed(torch.tensor(tokens[:-1]))])
        hidden = model.forward(inputs[None])[0][0, len(before) :]
        return F.cross_entropy(model.logits(hidden), torch.tensor(tokens[1:]))

    slots = torch.cat([prompt, model.embed(torch.tensor([START]))])
    divergences = []
    by_stage = [slots]
    for target in frontiers(graphs, objective.num_thoughts)[row]:
        hidden = last_hidden(slots)
        log_probs = model.logits(hidden).log_softmax(-1)
        divergences += [sum(t * (np.log(t) - log_probs[i]) for i, t in enumerate(target) if t)]
        fed = model.mix(hidden, Mixture()) if objective.is_soft else hidden
        slots = torch.cat([slots, fed[None]])
        by_stage.append(slots)
    loss = objective.frontier_weight * torch.stack(divergences).mean()
    loss += objective.direct_weight * mean_loss(prompt, [ANSWER, *cot[-2:]])
    loss += objective.cot_weight * mean_loss(prompt, cot)
    first = -model.logits(last_hidden(prompt)).log_softmax(-1)[cot[0]]
    loss += objective.cot_weight / len(cot) * first
    for stage in objective.stages:
        loss += mean_loss(by_stage[stage], [END, *cot[3 * min(stage, hops) :]])
    return loss


@pytest.mark.parametrize("is_soft", [False, True], ids=["hidden", "soft"])
@pytest.mark.parametrize("stages", [(0, 2, 5), (1, 3), ()])
@torch.no_grad()
def test_packed_loss_is_the_sum_of_separate_passes(
    model: Llama, graphs: Graphs, stages: tuple[int, ...], is_soft: bool
) -> None:
    objective = Objective(stages=stages, num_thoughts=5, cot_weight=2.0, is_soft=is_soft)
    packed = packed_loss(model, graphs, objective)
    torch.testing.assert_close(packed, spelled_loss(model, graphs, objective), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_chain_of_thought_alone_needs_no_thoughts(model: Llama, graphs: Graphs) -> None:
    def loss(num_thoughts: int) -> Tensor:
        return packed_loss(
            model, graphs, Objective(stages=(), num_thoughts=num_thoughts, frontier_weight=0.0)
        )

    torch.testing.assert_close(loss(0), loss(2))


@torch.no_grad()
def test_weights_of_zero_leave_parts_out(model: Llama, graphs: Graphs) -> None:
    nothing = Objective(
        stages=(2,), num_thoughts=2, cot_weight=0.0, direct_weight=0.0, frontier_weight=0.0
    )
    torch.testing.assert_close(
        packed_loss(model, graphs, nothing),
        spelled_loss(model, graphs, nothing),
        rtol=1e-6,
        atol=1e-6,
    )


def test_answer_after_the_last_thought_moves_the_first_one(graphs: Graphs) -> None:
    """Gradients flow back through all thoughts: the start token's embedding only enters there."""
    weights = initial_weights(3, has_prior=True)
    model = Llama({k: w.requires_grad_() for k, w in weights.items()})
    embedding = model.weights["model.embed_tokens.weight"]
    only_last = Objective(
        stages=(4,), num_thoughts=4, cot_weight=0.0, direct_weight=0.0, frontier_weight=0.0
    )
    [gradient] = torch.autograd.grad(packed_loss(model, graphs, only_last), [embedding])
    assert gradient[START].abs().max() > 1e-6


@torch.no_grad()
def test_lookup_loss_is_what_a_loop_over_edges_gives(model: Llama, graphs: Graphs) -> None:
    rng = np.random.default_rng(0)
    order = rng.random(graphs.edges.shape[:2]).argsort(axis=1)
    divergences = []
    for row, edges in enumerate(graphs.edges.tolist()):
        told = prompt_ids(graphs)[row, :-5].tolist()
        again = [edges[i] for i in order[row]]
        for place, (parent, _) in enumerate(again):
            before = [[FIRST_NAME + a, FIRST_NAME + b, 6] for a, b in again[:place]]
            ids = [*told, *(token for edge in before for token in edge), FIRST_NAME + parent]
            hidden, _ = model.forward(model.embed(torch.tensor([ids])))
            target = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
            target[[FIRST_NAME + b for a, b in edges if a == parent]] = 1.0
            target /= target.sum()
            log_probs = model.logits(hidden[0, -1]).log_softmax(-1)
            divergences.append(F.kl_div(log_probs, target, reduction="sum"))
    expected = torch.stack(divergences).mean()
    actual = lookup_loss(model, graphs, np.random.default_rng(0))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
