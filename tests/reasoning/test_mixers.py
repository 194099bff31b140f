"""Mixtures over an identity embedding: the vector that is fed is the weights themselves."""

from typing import Any

import pytest
import torch

from coconut_serve.params import MixtureParams
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.registry import mode_names
from coconut_serve.reasoning.settings import Admission
from coconut_serve.reasoning.slots import Slots
from coconut_serve.reasoning.step import ReasoningStep
from tests.fakes import make_request
from tests.reasoning.test_modes import start

pytestmark = pytest.mark.torch

VOCAB = 8
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -0.5, -1.0, -9.0])
FREE = {"temperature": 1.0, "top_p": 1.0, "filter_top_k": 0, "min_p": 0.0}


def weights(num: int = 1, **mixture: Any) -> torch.Tensor:
    """The weights of one step of `num` rows with seeds 0, 1, ...; [num, VOCAB]."""
    slots = Slots(num, VOCAB, dtype=torch.float32, device=torch.device("cpu"))
    table = torch.eye(VOCAB)
    step = ReasoningStep(
        slots,
        mode_names(),
        vocab_size=VOCAB,
        embedding=Embedding(lambda ids: table[ids], table),
        adapters=AdapterBank(),
        project_logits=lambda hidden: hidden,
    )
    params = MixtureParams(**(FREE | mixture))
    rows = []
    for slot in range(num):
        request = make_request(
            f"{slot}", mode="distribution", steps=3, seed=slot, temperature=1.0,
            reasoning={"mixture": params},
        )  # fmt: skip
        step.admit([Admission.read(slot, request)])
        rows.append(start(request).plan(slot))
    hidden = LOGITS.expand(num, -1)
    step.run(rows, hidden, hidden)
    return slots.vector.clone()


def test_full_is_the_softmax() -> None:
    torch.testing.assert_close(weights(kind="full")[0], LOGITS.softmax(-1))
    torch.testing.assert_close(weights(kind="full", temperature=0.5)[0], (2 * LOGITS).softmax(-1))


def test_norms_give_the_length_they_name() -> None:
    p = LOGITS.softmax(-1)
    torch.testing.assert_close(weights(kind="full", norm="l2")[0], p / p.norm())
    torch.testing.assert_close(weights(kind="full", norm="embed_mean")[0].norm(), torch.tensor(1.0))
    several = weights(2, kind="topk", top_k=3, norm="l2")
    torch.testing.assert_close(several.norm(dim=1), torch.ones(2))


def test_draws_come_as_often_as_their_probabilities() -> None:
    """4,000 rows of one draw; off by 5 standard errors anywhere: p < 1e-5."""
    num = 4000
    drawn = weights(num, kind="multiplex", top_k=1)
    assert bool(((drawn == 0) | (drawn == 1)).all())
    p = LOGITS.softmax(-1)
    assert ((drawn.mean(0) - p).abs() < 5 * (p * (1 - p) / num).sqrt() + 1e-6).all()


def test_filters_bound_what_is_drawn() -> None:
    drawn = weights(500, kind="multiplex", top_k=3, filter_top_k=2)
    assert drawn[:, :2].sum() == pytest.approx(500, rel=1e-4)
    nucleus = weights(500, kind="multiplex", top_k=3, top_p=0.5)
    assert bool((nucleus[:, 2:] == 0).all())


def test_weights_of_draws_are_their_shares_or_equal() -> None:
    p = LOGITS.softmax(-1)
    for row in weights(200, kind="multiplex", top_k=2):
        ids = row.nonzero().squeeze(1)
        if len(ids) == 2:
            torch.testing.assert_close(row[ids], p[ids] / p[ids].sum())
    equal = weights(200, kind="multiplex", top_k=3, weights="equal")
    thirds = (equal * 3).round()
    torch.testing.assert_close(equal * 3, thirds)
    assert bool((thirds > 1).any()), "with replacement a token may come twice"


def test_draws_without_replacement_are_distinct() -> None:
    distinct = weights(200, kind="multiplex", top_k=3, weights="equal", replacement=False)
    assert bool(((distinct > 0).sum(1) == 3).all())
    assert int((distinct[:, 0] > 0).sum()) > int((distinct[:, 6] > 0).sum())


def test_what_filters_dropped_fills_no_gap_among_distinct_draws() -> None:
    """Four draws of two tokens that are left: once two others had a quarter each."""
    halves = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0, 0]).expand(100, -1)
    asked = {"kind": "multiplex", "top_k": 4, "weights": "equal", "replacement": False}
    torch.testing.assert_close(weights(100, filter_top_k=2, **asked), halves)


def test_l2_adds_up_the_weights_of_a_token_that_comes_twice() -> None:
    for mixture in ({"kind": "multiplex", "top_k": 3}, {"kind": "moi", "top_k": 4}):
        several = weights(200, norm="l2", **mixture)
        torch.testing.assert_close(several.norm(dim=1), torch.ones(200))


def test_direct_mixture_feeds_the_distribution_alone() -> None:
    top = LOGITS.softmax(-1)[:4]
    direct = weights(kind="moi", top_k=4, moi_beta=-1.0)[0]
    torch.testing.assert_close(direct[:4], top / top.sum())
    assert bool((direct[4:] == 0).all())


def test_clamp_bounds_gumbel_noise() -> None:
    """With both bounds nearly equal the noise cancels."""
    calm = weights(20, top_k=5, noise="gumbel", noise_temperature=1.0, noise_clamp=(0.0, 1e-6))
    top = LOGITS.softmax(-1)[:5]
    torch.testing.assert_close(calm[:, :5], (top / top.sum()).expand(20, -1), atol=1e-5, rtol=1e-5)
