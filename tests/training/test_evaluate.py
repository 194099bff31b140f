"""Batched answers equal the plain loop's, and only strictly right ones count."""

from pathlib import Path

import numpy as np
import pytest
import torch

from coconut_serve.training import evaluate
from coconut_serve.training.evaluate import Mode, generate, is_right, wilson_interval
from coconut_serve.training.export import save_model
from coconut_serve.training.initial import initial_weights
from coconut_serve.training.model import Llama, Mixture
from coconut_serve.training.task import Graphs, prompt_ids
from coconut_serve.training.vocabulary import ANSWER, EOS, FIRST_NAME
from tests.models import load_plain
from tests.training.reference import answer

pytestmark = pytest.mark.torch

MODES = {
    "none": evaluate.DIRECT,
    "cot": evaluate.COT,
    "latent": evaluate.latent(3),
    "distribution": evaluate.distribution(3, Mixture(top_k=4)),
}


@pytest.mark.parametrize("name", MODES)
def test_batched_answers_are_those_of_the_plain_loop(
    name: str, graphs: Graphs, tmp_path: Path
) -> None:
    model = Llama(initial_weights(5, has_prior=True))
    save_model(model, tmp_path)
    plain = load_plain(tmp_path)
    batch = generate(model, graphs, MODES[name]).tolist()
    for ids, prompt in zip(batch, prompt_ids(graphs).tolist(), strict=True):
        expected = answer(plain, prompt, name, steps=3, top_k=4)
        assert ids[: len(expected)] == expected
        assert len(expected) == evaluate.MAX_TOKENS or ids[len(expected)] == EOS


def right(graphs: Graphs, tokens: list[int], mode: Mode = evaluate.COT) -> bool:
    return bool(is_right(graphs.take(slice(1)), torch.tensor([tokens]), mode)[0])


def test_only_the_name_after_the_mark_and_then_the_end_is_right(graphs: Graphs) -> None:
    x = int(graphs.path[0, -1]) + FIRST_NAME
    wrong = x + 1 if x + 1 < FIRST_NAME + 32 else FIRST_NAME
    assert right(graphs, [wrong, x, ANSWER, x, EOS])
    assert right(graphs, [ANSWER, x, EOS, 7, 7])
    assert right(graphs, [x, EOS], evaluate.DIRECT)
    assert not right(graphs, [ANSWER, wrong, EOS])
    assert not right(graphs, [ANSWER, x, x, EOS])
    assert not right(graphs, [x, EOS, EOS]), "the mark is missing"
    assert not right(graphs, [wrong, wrong, ANSWER]), "cut off"
    assert not right(graphs, [wrong, EOS, ANSWER, x, EOS]), "after the end"
    assert not right(graphs, [wrong, EOS], evaluate.DIRECT)


def test_accuracy_is_the_share_of_right_answers(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.from_numpy(np.stack([np.full(6, ANSWER), graphs.path[:, -1] + FIRST_NAME], axis=1))
    ids[:2, 1] = EOS

    def give(model: Llama, graphs: Graphs, mode: Mode) -> torch.Tensor:
        return ids

    monkeypatch.setattr(evaluate, "generate", give)
    model = Llama(initial_weights(5, has_prior=True))
    assert evaluate.accuracy(model, graphs, evaluate.COT) == pytest.approx(4 / 6)


def test_wilson_interval_of_known_values() -> None:
    """Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    low, high = wilson_interval(1.0, 500)
    assert high == 1.0
    assert low == pytest.approx(0.9924, abs=1e-4)
