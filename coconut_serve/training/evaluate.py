"""Generates the demo's greedy answers in each mode, in batches, and scores them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor

from coconut_serve.training.model import Llama, Mixture
from coconut_serve.training.task import Graphs, prompt_ids
from coconut_serve.training.vocabulary import ANSWER, END, EOS, FIRST_NAME, START

MAX_TOKENS = 20  # the longest chain of thought takes 3 * 5 + 3
SERVED_MIXTURE = Mixture(top_k=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way to prompt the model."""

    name: str
    suffix: tuple[int, ...] = ()  # after the prompt
    steps: int = 0  # thoughts
    mixture: Mixture | None = None  # None feeds hidden states
    end: tuple[int, ...] = ()  # after the thoughts


DIRECT = Mode(name="none", suffix=(ANSWER,))
COT = Mode(name="cot")


def latent(steps: int) -> Mode:
    """Think in hidden states; with 0 steps the markers stay."""
    return Mode(name="latent", suffix=(START,), steps=steps, end=(END,))


def distribution(steps: int, mixture: Mixture = SERVED_MIXTURE) -> Mode:
    """Think in soft tokens, in the latent slots."""
    return Mode(name="distribution", suffix=(START,), steps=steps, mixture=mixture, end=(END,))


@torch.inference_mode()
def generate(model: Llama, graphs: Graphs, mode: Mode) -> Tensor:
    """Generate answers greedily.

    Returns:
        [num_graphs, MAX_TOKENS] token ids; those after an end token are undefined.
    """
    prompt = torch.from_numpy(prompt_ids(graphs)).to(model.device)
    rows = len(prompt)
    suffix = torch.tensor(mode.suffix, dtype=torch.long, device=model.device).expand(rows, -1)
    hidden, cache = model.forward(model.embed(torch.cat([prompt, suffix], dim=1)))
    if mode.steps:
        cache = model.think(hidden[:, -1], cache, mode.steps, mode.mixture).cache
    for token in mode.end:
        hidden, cache = model.forward(model.embed(prompt.new_full((rows, 1), token)), cache=cache)
    written = []
    for _ in range(MAX_TOKENS):
        written.append(model.logits(hidden[:, -1:]).argmax(dim=-1))
        if bool((torch.cat(written, dim=1) == EOS).any(dim=1).all()):
            break
        hidden, cache = model.forward(model.embed(written[-1]), cache=cache)
    answer = torch.cat(written, dim=1)
    return F.pad(answer, (0, MAX_TOKENS - answer.shape[1]), value=EOS)


def is_right(graphs: Graphs, answers: Tensor, mode: Mode) -> Tensor:
    """Check answers strictly: the right name after the first `###`, then the end token.

    Returns:
        [num_graphs] bool.
    """
    has_ended = (answers == EOS).cumsum(dim=1) > 0
    ids = answers.masked_fill(has_ended, EOS).cpu()
    if ANSWER in mode.suffix:
        ids = torch.cat([torch.full((len(ids), 1), ANSWER), ids], dim=1)
    ids = F.pad(ids, (0, 2), value=EOS)
    place = (ids == ANSWER).int().argmax(dim=1, keepdim=True)  # 0 if there is none: then wrong
    found = ids.gather(1, place + torch.arange(3))
    expected = torch.full_like(found, EOS)
    expected[:, 0] = ANSWER
    expected[:, 1] = torch.from_numpy(graphs.path[:, -1] + FIRST_NAME)
    right: Tensor = (found == expected).all(dim=1)
    return right


def accuracy(model: Llama, graphs: Graphs, mode: Mode) -> float:
    """Compute the share of right answers."""
    return float(is_right(graphs, generate(model, graphs, mode), mode).float().mean())


def accuracies(model: Llama, per_hop: Iterable[Graphs], mode: Mode) -> list[float]:
    """Compute the accuracy for each number of hops."""
    return [round(accuracy(model, graphs, mode), 4) for graphs in per_hop]


def wilson_interval(ratio: float, count: int) -> tuple[float, float]:
    """Compute the 95 % confidence interval of a share of `count` independent trials."""
    z = 1.959964
    centre = ratio + z * z / (2 * count)
    half = z * math.sqrt(ratio * (1 - ratio) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
