"""The loop that served checkpoints are compared with: the whole sequence anew at each position."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.convert.builders import Case

MAX_TOKENS = 6


@dataclass
class Run:
    """What the loop did."""

    fed: list[Tensor] = field(default_factory=list)  # vectors
    hidden: list[Tensor] = field(default_factory=list)  # before each of them, and at the stop
    logits: list[Tensor] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


Stop = Callable[[int, Tensor], bool]  # the step's number, its logits


@torch.inference_mode()
def original(
    case: Case,
    prompt: tuple[int, ...],
    steps: int,
    *,
    end: tuple[int, ...] = (),
    banned: tuple[int, ...] = (),
    stop: Stop = lambda step, logits: False,
    mix: Callable[[Tensor, Any], Tensor] | None = None,
    end_adds_latent: bool = False,
    keeps_last: bool = False,
    max_tokens: int = MAX_TOKENS,
) -> Run:
    """Think, feed the end tokens, answer."""
    embed = case.model.get_input_embeddings()
    inputs = embed(torch.tensor([list(prompt)]))  # [1, length, hidden_size]
    run = Run()

    def feed(row: Tensor) -> None:
        nonlocal inputs
        inputs = torch.cat([inputs, row.reshape(1, 1, -1)], dim=1)

    def forward() -> tuple[Tensor, Tensor]:
        out = case.model(inputs_embeds=inputs, use_cache=False, output_hidden_states=True)
        return out.hidden_states[-1][0, -1], out.logits[0, -1]

    def next_input(hidden: Tensor, logits: Tensor) -> Tensor:
        if mix is not None:
            return mix(logits, embed)
        adapter = case.adapter or case.fed
        fed: Tensor = hidden if adapter is None else adapter(hidden) * case.emb_std
        return fed

    latent = torch.zeros(inputs.shape[-1])
    for step in range(steps + 1):
        hidden, logits = forward()
        latent = next_input(hidden, logits)
        run.hidden.append(hidden)
        run.logits.append(logits)
        is_over = step < steps and stop(step, logits)
        if step == steps or (is_over and not keeps_last):
            break
        run.fed.append(latent)
        feed(latent)
        if is_over:
            break
    for number, token in enumerate(end):
        row = embed(torch.tensor(token))
        feed(row + latent if end_adds_latent and number == 0 else row)
    while len(run.answer) < max_tokens:
        _, logits = forward()
        logits = logits.clone()
        logits[list(banned)] = -torch.inf
        run.answer.append(int(logits.argmax()))
        feed(embed(torch.tensor(run.answer[-1])))
    return run
