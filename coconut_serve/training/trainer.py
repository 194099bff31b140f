"""The training loop: steps, learning curve, and checkpoints that resume exactly."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from coconut_serve.errors import StartupError
from coconut_serve.training import evaluate
from coconut_serve.training.initial import initial_weights
from coconut_serve.training.model import Llama
from coconut_serve.training.packing import lookup_loss, packed_loss
from coconut_serve.training.recipe import MAX_THOUGHTS, Recipe
from coconut_serve.training.task import sample, sample_each

CHECKPOINT: Final = "checkpoint.safetensors"
_CURVE_MODES: Final = (
    evaluate.DIRECT,
    evaluate.COT,
    evaluate.latent(MAX_THOUGHTS),
    evaluate.distribution(MAX_THOUGHTS),
)
_DEV_SEED: Final = 1
_DEV_PER_HOP: Final = 128
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")  # torch's names for AdamW's state


class Trainer:
    """Trains one model by one recipe; an interrupted run resumes with identical results."""

    def __init__(self, recipe: Recipe, directory: Path, *, device: str = "cpu") -> None:
        """Start from the initial weights; `directory` is for the checkpoint."""
        self.recipe = recipe
        self.step = 0  # the next one, over all phases
        self.curve: list[dict[str, Any]] = []  # accuracies on dev questions
        self.seconds = 0.0  # spent, over all runs
        weights = initial_weights(recipe.seed, has_prior=recipe.has_prior)
        self.model = Llama({k: w.to(device).requires_grad_() for k, w in weights.items()})
        self._directory = directory
        self._optimizer = self._new_optimizer()

    def run(self, *, until: int | None = None, every: int = 300) -> None:
        """Train, evaluating and saving periodically.

        Args:
            until: The step to stop before; None: the end of the recipe.
            every: Steps between evaluations, and between checkpoints.
        """
        end = self.recipe.num_steps
        last = end if until is None else until
        started = time.monotonic() - self.seconds
        with tqdm(total=end, initial=self.step, unit="step", mininterval=1) as bar:
            while self.step < last:
                loss = self.train_step()
                self.seconds = time.monotonic() - started
                if self.step % every == 0 or self.step == end:
                    self._note_accuracies(loss)
                if self.step % every == 0 or self.step == last:
                    self.save()
                bar.set_postfix(self._progress(loss), refresh=False)
                bar.update()

    def train_step(self) -> float:
        """Run one step and return its loss."""
        place = self.recipe.locate(self.step)
        if place.step == 0:
            self._optimizer = self._new_optimizer()
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_at(place)
        loss = self._loss()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        torch.nn.utils.clip_grad_norm_(self.model.weights.values(), self.recipe.max_gradient_norm)
        self._optimizer.step()
        self.step += 1
        return loss.item()

    def _loss(self) -> Tensor:
        place = self.recipe.locate(self.step)
        # The step's only source of randomness, so checkpoints need no generator state.
        rng = np.random.default_rng([self.recipe.seed, place.phase_index, place.step])
        hops = place.phase.hops[place.step % len(place.phase.hops)]
        graphs = sample(rng, hops, self.recipe.batch_size, "train")
        if place.phase.is_lookup:
            return lookup_loss(self.model, graphs, rng)
        return packed_loss(self.model, graphs, self.recipe.objective_at(place, rng))

    def _new_optimizer(self) -> torch.optim.Optimizer:
        weights, decay = self.model.weights.values(), self.recipe.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": decay},
            {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=self.recipe.betas)

    def _note_accuracies(self, loss: float) -> None:
        """Add a point to the learning curve."""
        dev = sample_each(_DEV_SEED, _DEV_PER_HOP, "dev")
        by_mode = {mode.name: evaluate.accuracies(self.model, dev, mode) for mode in _CURVE_MODES}
        point = {"step": self.step, "seconds": round(self.seconds), "loss": round(loss, 4)}
        self.curve.append({**point, "accuracy": by_mode})

    def _progress(self, loss: float) -> dict[str, str]:
        """Format the loss and the latest accuracies by hops, for the progress bar."""
        accuracy = self.curve[-1]["accuracy"] if self.curve else {}
        shown = {mode: "/".join(f"{100 * a:.0f}" for a in row) for mode, row in accuracy.items()}
        return {"loss": f"{loss:.3f}", **shown}

    def save(self) -> None:
        """Write weights, optimizer and place to one file, replaced atomically."""
        tensors = {name: weight.detach() for name, weight in self.model.weights.items()}
        for name, weight in self.model.weights.items():
            state = self._optimizer.state.get(weight, {})
            tensors |= {f"{key}.{name}": state[key] for key in _MOMENTS if state}
        place = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        metadata = {"place": json.dumps(place), "recipe": json.dumps(asdict(self.recipe))}
        self._directory.mkdir(parents=True, exist_ok=True)
        partial = self._directory / f".{CHECKPOINT}"
        save_file(tensors, partial, metadata)
        os.replace(partial, self._directory / CHECKPOINT)

    def load(self) -> None:
        """Resume from the checkpoint.

        Raises:
            StartupError: There is none, or it belongs to another recipe.
        """
        path = self._directory / CHECKPOINT
        if not path.is_file():
            raise StartupError(f"there is no checkpoint {path} to resume from", param="--resume")
        with safe_open(path, "pt", device=str(self.model.device)) as file:
            metadata: dict[str, str] = file.metadata()
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if metadata["recipe"] != json.dumps(asdict(self.recipe)):
            raise StartupError(f"{path} was made with other settings", param="--resume")
        place = json.loads(metadata["place"])
        self.step, self.seconds, self.curve = place["step"], place["seconds"], place["curve"]
        self._restore(tensors)

    @torch.no_grad()
    def _restore(self, tensors: dict[str, Tensor]) -> None:
        self._optimizer = self._new_optimizer()
        num_updates = torch.tensor(float(self.recipe.locate(self.step).step))
        for name, weight in self.model.weights.items():
            weight.copy_(tensors[name])
            if num_updates:
                moments = {key: tensors[f"{key}.{name}"] for key in _MOMENTS}
                self._optimizer.state[weight] = {"step": num_updates.clone(), **moments}
