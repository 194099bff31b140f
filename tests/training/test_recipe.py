"""Which step belongs where, and what the switches change."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest

from coconut_serve.training.packing import Objective
from coconut_serve.training.recipe import MAX_THOUGHTS, Place, Recipe, demo_recipe

pytestmark = pytest.mark.torch

RECIPE = demo_recipe(seed=4)


def objective(step: int, recipe: Recipe = RECIPE) -> Objective:
    return recipe.objective_at(recipe.locate(step), np.random.default_rng(step))


def test_phases_follow_each_other_without_gaps() -> None:
    lookup, latent, *_, last = RECIPE.phases
    assert RECIPE.locate(0).phase is lookup
    assert RECIPE.locate(lookup.steps).phase is latent
    assert RECIPE.locate(lookup.steps).step == 0
    end = RECIPE.locate(RECIPE.num_steps)
    assert (end.phase_index, end.step) == (3, last.steps)


def test_scale_shortens_every_phase_but_leaves_a_step() -> None:
    assert [p.steps for p in demo_recipe(scale=0.5).phases] == [150, 525, 2100, 1000]
    assert [p.steps for p in demo_recipe(scale=1e-9).phases] == [1, 1, 1, 1]


def test_learning_rate_warms_up_stays_and_falls() -> None:
    phase = RECIPE.phases[2]
    places = (Place(phase_index=2, phase=phase, step=step) for step in range(phase.steps))
    rates = [RECIPE.learning_rate_at(place) for place in places]
    assert rates[0] == pytest.approx(RECIPE.learning_rate / RECIPE.warmup_steps)
    middle = rates[RECIPE.warmup_steps : len(rates) // 2]
    assert set(middle) == {RECIPE.learning_rate}
    assert rates[-1] == pytest.approx(0.02 * RECIPE.learning_rate)
    assert all(a >= b for a, b in pairwise(rates[len(rates) // 2 :]))


def test_all_thought_counts_and_both_kinds_of_input_are_trained() -> None:
    seen = [objective(step) for step in range(2000, 2200)]
    assert {stage for o in seen for stage in o.stages} == set(range(MAX_THOUGHTS + 1))
    assert all(len(set(o.stages)) == 3 for o in seen)
    assert 0.2 < np.mean([o.is_soft for o in seen]) < 0.4


def test_frontier_can_be_switched_off() -> None:
    assert objective(2000).frontier_weight == 1.0
    without = dataclasses.replace(RECIPE, has_frontier=False)
    assert objective(2000, without).frontier_weight == 0.0


def test_staged_training_replaces_steps_by_thoughts_one_by_one() -> None:
    staged = dataclasses.replace(RECIPE, is_staged=True, phases=RECIPE.phases[2:3])
    stages = [objective(step, staged) for step in range(staged.num_steps)]
    assert stages[0].stages == ()
    assert stages[0].cot_weight > 0.0
    assert stages[-1].stages == (MAX_THOUGHTS,)
    counts = [o.num_thoughts for o in stages]
    assert counts == sorted(counts)
    assert all(o.stages == (o.num_thoughts,) and not o.cot_weight for o in stages if o.num_thoughts)
