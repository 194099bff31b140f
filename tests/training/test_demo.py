"""The shipped demo does what its card says, by transformers and a plain loop."""

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from coconut_serve.checkpoint.weights import resolve_model
from coconut_serve.training.task import partition_of
from coconut_serve.training.vocabulary import NAMES
from tests.models import load_plain
from tests.training.reference import ANSWER, answer

pytestmark = pytest.mark.torch

DEMO = resolve_model("demo")
QUESTIONS: list[dict[str, Any]] = json.loads((DEMO / "test.json").read_text())


def ratio_right(mode: str, questions: list[dict[str, Any]], **options: int) -> float:
    """Share of answers that are the right name after `###`, and nothing else."""
    model, tokenizer = load_plain(DEMO), AutoTokenizer.from_pretrained(DEMO)
    num_right = 0
    for question in questions:
        prompt = tokenizer(question["question"]).input_ids
        tokens = answer(model, prompt, mode, **options)
        expected = tokenizer.convert_tokens_to_ids([question["answer"]])
        written = tokens[tokens.index(ANSWER) + 1 :] if ANSWER in tokens else []
        num_right += (tokens if mode == "none" else written) == expected
    return num_right / len(questions)


def test_questions_are_held_out() -> None:
    assert Counter(question["hops"] for question in QUESTIONS) == {2: 300, 3: 300, 4: 300, 5: 300}
    for question in QUESTIONS:
        edges = [edge.split(" > ") for edge in question["question"].split(", ")[:-1]]
        ids = np.array([[[NAMES.index(name) for name in edge] for edge in edges]])
        assert partition_of(ids)[0] == 0
        steps = [step.split(" > ") for step in question["steps"]]
        assert all(step in edges for step in steps)
        assert all(before[1] == after[0] for before, after in pairwise(steps))
        assert steps[-1][1] == question["answer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "least", "most"),
    [("none", 0.35, 0.65), ("cot", 0.6, 0.95), ("latent", 0.98, 1.0), ("distribution", 0.97, 1.0)],
)
def test_accuracy_on_200_held_out_questions(mode: str, least: float, most: float) -> None:
    """50 questions of each number of hops; chance is half, +-0.15 is four standard deviations."""
    assert least <= ratio_right(mode, QUESTIONS[::6]) <= most


def test_soft_tokens_of_one_word_collapse_the_search() -> None:
    assert ratio_right("distribution", QUESTIONS[::24], top_k=1) < 0.85


def test_thoughts_pay_off_up_to_the_number_of_hops() -> None:
    five_hops = QUESTIONS[900::12]
    few, enough = (ratio_right("latent", five_hops, steps=steps) for steps in (1, 5))
    assert few < 0.9
    assert enough >= 0.96


def test_card_and_record_are_those_of_the_full_recipe() -> None:
    record = json.loads((DEMO / "training.json").read_text())
    assert record["steps"] == sum(phase["steps"] for phase in record["recipe"]["phases"])
    assert record["recipe"]["has_frontier"]
    assert record["recipe"]["has_prior"]
    assert (DEMO / "model.safetensors").stat().st_size < 10_000_000
    assert f"{record['steps']:,} steps" in (DEMO / "README.md").read_text()
