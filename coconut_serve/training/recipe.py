"""What the demo is trained on and for how long: phases counted in steps, never by the clock."""

import dataclasses
from dataclasses import dataclass
from typing import Final

import numpy as np

from coconut_serve.training.packing import Objective
from coconut_serve.training.task import HOPS

MAX_THOUGHTS: Final = 6
_LAST_RATE: Final = 0.02  # of the learning rate, at least, however late


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the training, with an optimizer of its own."""

    name: str
    steps: int
    hops: tuple[int, ...] = HOPS  # batches take turns
    is_lookup: bool = False  # edge lookup only; what follows does not matter then
    num_thoughts: int = MAX_THOUGHTS
    first_stage: int = 1  # fewest thoughts that are trained; 0: both markers, nothing in between
    num_stages: int = MAX_THOUGHTS  # thought counts trained in one batch, drawn anew for each
    soft_ratio: float = 0.0  # of the batches feed soft tokens
    cot_weight: float = 1.0
    decay_from: float = 1.0  # share of the phase after which the learning rate falls linearly


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where in a recipe a step is."""

    phase_index: int
    phase: Phase
    step: int  # within the phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that decides the weights: on the same machine and threads it gives the same bits."""

    phases: tuple[Phase, ...]
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100  # of each phase
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01  # of matrices
    max_gradient_norm: float = 1.0
    direct_weight: float = 0.3
    has_frontier: bool = True  # thoughts are supervised by the search frontier
    has_prior: bool = True  # see initial.py
    is_staged: bool = False  # COCONUT's curriculum: steps are replaced by thoughts one by one

    @property
    def num_steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def locate(self, step: int) -> Place:
        """Find the phase of a step; the end counts as the last phase's."""
        for index, phase in enumerate(self.phases):
            if step < phase.steps:
                return Place(phase_index=index, phase=phase, step=step)
            step -= phase.steps
        return Place(phase_index=index, phase=phase, step=phase.steps)

    def learning_rate_at(self, place: Place) -> float:
        """Warm up, stay, and fall from `decay_from` on."""
        phase = place.phase
        warm = min(1.0, (place.step + 1) / self.warmup_steps)
        left = (phase.steps - place.step) / max(1.0, phase.steps * (1 - phase.decay_from))
        return self.learning_rate * warm * max(_LAST_RATE, min(1.0, left))

    def objective_at(self, place: Place, rng: np.random.Generator) -> Objective:
        """Choose what a step is trained for."""
        phase = place.phase
        is_soft = bool(rng.random() < phase.soft_ratio)
        if self.is_staged:
            return self._staged(place, is_soft)
        first = phase.first_stage
        stages = first + rng.permutation(phase.num_thoughts + 1 - first)[: phase.num_stages]
        return Objective(
            stages=tuple(sorted(stages.tolist())),
            num_thoughts=phase.num_thoughts,
            cot_weight=phase.cot_weight,
            direct_weight=self.direct_weight,
            frontier_weight=float(self.has_frontier),
            is_soft=is_soft,
        )

    def _staged(self, place: Place, is_soft: bool) -> Objective:
        """First the chain of thought alone, then only stage 1, only stage 2, ..."""
        stage = place.step * (place.phase.num_thoughts + 1) // place.phase.steps
        return Objective(
            stages=(stage,) if stage else (),
            num_thoughts=stage,
            cot_weight=0.0 if stage else place.phase.cot_weight,
            direct_weight=0.0,
            frontier_weight=float(self.has_frontier and stage > 0),
            is_soft=is_soft,
        )


def demo_recipe(*, seed: int = 0, scale: float = 1.0) -> Recipe:
    """Build the recipe of the demo; `scale` shortens its phases."""
    phases = (
        Phase(name="lookup", steps=300, is_lookup=True),
        Phase(name="latent", steps=1050, hops=(2, 3, 4), num_thoughts=4, num_stages=4),
        Phase(
            name="all",
            steps=4200,
            first_stage=0,
            num_stages=3,
            soft_ratio=0.3,
            cot_weight=2.0,
            decay_from=0.55,
        ),
        Phase(
            name="soft",
            steps=2000,
            first_stage=0,
            num_stages=3,
            soft_ratio=0.6,
            cot_weight=2.0,
            decay_from=0.0,
        ),
    )
    scaled = (dataclasses.replace(p, steps=max(1, round(p.steps * scale))) for p in phases)
    return Recipe(phases=tuple(scaled), seed=seed)
