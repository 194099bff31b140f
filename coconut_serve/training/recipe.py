"""The demo's training recipe: phases measured in steps, never in seconds."""

import dataclasses
from dataclasses import dataclass
from typing import Final

import numpy as np

from coconut_serve.training.packing import Objective
from coconut_serve.training.task import HOPS

MAX_THOUGHTS: Final = 6
_LAST_RATE: Final = 0.02  # lower bound of the decay, as a share of the learning rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of the training, with its own optimizer."""

    name: str
    steps: int
    hops: tuple[int, ...] = HOPS  # of the batches, in turn
    is_lookup: bool = False  # edge lookup only; ignores the fields below
    num_thoughts: int = MAX_THOUGHTS
    first_stage: int = 1  # fewest thoughts trained; 0: both markers with nothing between them
    num_stages: int = MAX_THOUGHTS  # thought counts per batch, drawn for each
    soft_ratio: float = 0.0  # share of batches that feed soft tokens
    cot_weight: float = 1.0
    decay_from: float = 1.0  # share of the phase after which the learning rate falls linearly


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A step's place in a recipe."""

    phase_index: int
    phase: Phase
    step: int  # within the phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that determines the weights, bit by bit on the same machine and thread count."""

    phases: tuple[Phase, ...]
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 2e-3
    warmup_steps: int = 100  # of each phase
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01  # of matrices
    max_gradient_norm: float = 1.0
    direct_weight: float = 0.3
    has_frontier: bool = True  # the search frontier supervises the thoughts
    has_prior: bool = True  # see initial.py
    is_staged: bool = False  # COCONUT's curriculum: thoughts replace steps one by one

    @property
    def num_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def locate(self, step: int) -> Place:
        """Find the phase of a step; the end belongs to the last phase."""
        for index, phase in enumerate(self.phases):
            if step < phase.steps:
                return Place(phase_index=index, phase=phase, step=step)
            step -= phase.steps
        return Place(phase_index=index, phase=phase, step=phase.steps)

    def learning_rate_at(self, place: Place) -> float:
        """Compute the rate: warm-up, constant, then linear decay from `decay_from`."""
        phase = place.phase
        warm = min(1.0, (place.step + 1) / self.warmup_steps)
        left = (phase.steps - place.step) / max(1.0, phase.steps * (1 - phase.decay_from))
        return self.learning_rate * warm * max(_LAST_RATE, min(1.0, left))

    def objective_at(self, place: Place, rng: np.random.Generator) -> Objective:
        """Choose the training targets of a step."""
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
        """Train the chain of thought alone, then only stage 1, only stage 2, ..."""
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
    """Build the demo's recipe; `scale` multiplies the length of its phases."""
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
