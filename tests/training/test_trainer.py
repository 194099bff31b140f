"""Training can be cut off anywhere and repeats bit by bit."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from coconut_serve.errors import StartupError
from coconut_serve.training import trainer as module
from coconut_serve.training.recipe import Phase, Recipe
from coconut_serve.training.trainer import CHECKPOINT, Trainer

pytestmark = pytest.mark.torch

PHASES = (
    Phase(name="lookup", steps=2, is_lookup=True),
    Phase(name="latent", steps=4, hops=(2, 3), num_thoughts=2, num_stages=2, soft_ratio=0.5),
)
RECIPE = Recipe(phases=PHASES, batch_size=4, warmup_steps=2)


@pytest.fixture(autouse=True)
def few_dev_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEV_PER_HOP", 4)


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.weights.items()}


def assert_same(left: Trainer, right: Trainer) -> None:
    for name, weight in weights_of(left).items():
        assert torch.equal(weight, right.model.weights[name]), name


@pytest.mark.parametrize("cut", [1, 2, 3, 5])
def test_resumed_training_equals_training_straight_through(tmp_path: Path, cut: int) -> None:
    """The cuts are within a phase, between phases, and after the first step of one."""
    straight = Trainer(RECIPE, tmp_path / "straight")
    straight.run()
    first = Trainer(RECIPE, tmp_path / "cut")
    first.run(until=cut)
    second = Trainer(RECIPE, tmp_path / "cut")
    second.load()
    assert second.step == cut
    second.run()
    assert second.step == straight.step == RECIPE.num_steps
    assert_same(straight, second)
    assert [p["accuracy"] for p in second.curve] == [p["accuracy"] for p in straight.curve]


def test_other_seed_gives_other_weights(tmp_path: Path) -> None:
    one, other = (Trainer(dataclasses.replace(RECIPE, seed=s), tmp_path) for s in (0, 1))
    assert not torch.equal(one.model.embed(torch.tensor(10)), other.model.embed(torch.tensor(10)))


def test_loss_falls(tmp_path: Path) -> None:
    recipe = Recipe(phases=(Phase(name="lookup", steps=60, is_lookup=True),), batch_size=16)
    trainer = Trainer(recipe, tmp_path)
    losses = [trainer.train_step() for _ in range(recipe.num_steps)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_killed_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(RECIPE, tmp_path)
    trainer.save()
    before = (tmp_path / CHECKPOINT).read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    trainer.train_step()
    with pytest.raises(KeyboardInterrupt):
        trainer.save()
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_resuming_needs_a_checkpoint_of_the_same_recipe(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no checkpoint"):
        Trainer(RECIPE, tmp_path).load()
    Trainer(RECIPE, tmp_path).save()
    with pytest.raises(StartupError, match="other settings"):
        Trainer(dataclasses.replace(RECIPE, has_frontier=False), tmp_path).load()
