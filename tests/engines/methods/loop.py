"""A loop over one row that recomputes the whole sequence at each position.

It knows phases, end tokens and blocks; what a step feeds is a `Step`. It shares no code with the
engines but the numbers that their random generator gives.

It runs free, or follows an engine: each step is decided anew, but what goes in is what the engine
fed. A random model doubles a rounding error about every step, so that after twelve of them two
right programs differ by what the CPU and its kernels happen to be; a step from the same inputs
differs by the rounding of one step alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from coconut_serve.reasoning import noise
from coconut_serve.types import Request
from tests.engines.methods.adapters import make_adapters
from tests.models import load_plain


@dataclass
class Parts:
    """A model taken apart."""

    model: Any
    table: Tensor  # [vocab_size, hidden_size], the input embeddings
    head: Tensor  # [vocab_size, hidden_size]
    adapters: dict[str, nn.Module]

    @classmethod
    def load(cls, directory: Path) -> "Parts":
        model: Any = load_plain(directory).requires_grad_(False)
        table = model.get_input_embeddings().weight
        adapters = make_adapters(table.shape[1])
        for adapter in adapters.values():
            adapter.requires_grad_(False)
        return cls(model, table, model.get_output_embeddings().weight, adapters)


@dataclass
class At:
    """What a decision looks at."""

    step: int  # of this thinking phase
    decision: int  # since the prompt: what the noise is numbered by
    seed: int
    hidden: Tensor  # [hidden_size], after the final norm
    logits: Tensor  # [vocab_size]
    table: Tensor

    def uniform(self, stream: int, columns: list[int]) -> list[float]:
        """The engine's random numbers of this decision."""
        one = torch.tensor([self.seed]), torch.tensor([self.decision])
        drawn: list[float] = noise.uniform(*one, stream, torch.tensor([columns]))[0].tolist()
        return drawn

    def normal(self, stream: int) -> Tensor:
        """As many of them, standard normal, as a vector has components."""
        one = torch.tensor([self.seed]), torch.tensor([self.decision])
        return noise.normal(*one, stream, torch.arange(len(self.hidden))[None])[0]


class Fed(NamedTuple):
    """What a step decides: its text, what is fed, whether the phase ends here."""

    text: int | None
    vector: Tensor
    ends: bool = False


Step = Callable[[At], Fed]
Say = Callable[[At], int]


@dataclass
class Told:
    """What the loop did."""

    texts: list[int | None] = field(default_factory=list)
    fed: list[Tensor] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # steps of each block


class Row:
    """Inputs so far and where they stand."""

    def __init__(self, parts: Parts, request: Request, heard: Sequence[Tensor] | None) -> None:
        self.parts, self.request = parts, request
        self.heard = heard  # what an engine fed while it thought
        self.inputs = parts.table[list(request.prompt_token_ids)]
        self.num_prompt = len(self.inputs)
        self.positions = list(range(self.num_prompt + request.max_new_positions))

    def feed(self, row: Tensor) -> None:
        self.inputs = torch.cat([self.inputs, row[None]])

    def look(self, step: int, seed: int) -> At:
        """Run the model over everything."""
        at = torch.tensor(self.positions[: len(self.inputs)])[None]
        out = self.parts.model(
            inputs_embeds=self.inputs[None],
            position_ids=at,
            attention_mask=torch.ones_like(at),  # else a jump in positions reads as another text
            use_cache=False,
            output_hidden_states=True,
        )
        hidden, logits = out.hidden_states[-1][0, -1], out.logits[0, -1].float()
        decision = len(self.inputs) - self.num_prompt
        return At(step, decision, seed, hidden, logits, self.parts.table)


def think(row: Row, step: Step, told: Told) -> bool:
    """One phase: its steps, then the end tokens; or, where a step ends it, the final words."""
    params, number, has_final = row.request.reasoning, 0, False
    last = torch.zeros(row.inputs.shape[1])
    while number < params.steps or params.end_adds_vector:
        fed = step(row.look(number, row.request.thinking_seed))
        last = fed.vector
        if number == params.steps or (fed.ends and not params.keeps_last):
            has_final = fed.ends and bool(params.switch.final_token_ids)
            break
        told.texts.append(fed.text)
        told.fed.append(last)
        if row.heard is not None:
            assert len(told.fed) <= len(row.heard), "the engine's phase ended before"
        row.feed(last if row.heard is None else row.heard[len(told.fed) - 1])
        number += 1
        if fed.ends:
            break
    told.lengths.append(number)
    if params.pad_positions:
        at = len(row.inputs)
        del row.positions[at : at + params.steps - number]
    words = params.switch.final_token_ids if has_final else params.end_token_ids
    for place, token in enumerate(words):
        embedding = row.parts.table[token]
        row.feed(embedding + last if params.end_adds_vector and place == 0 else embedding)
    return has_final


@torch.inference_mode()
def loop(
    parts: Parts, request: Request, step: Step, say: Say, heard: Sequence[Tensor] | None = None
) -> Told:
    """Think, answer, and think again where the answer opens a block.

    Args:
        parts: The model.
        request: What is asked.
        step: Decides what a thinking step feeds.
        say: Draws a token of the answer.
        heard: What an engine fed at each thinking step, to follow it; None: run free.
    """
    params, told, row = request.reasoning, Told(), Row(parts, request, heard)
    opens = params.enter_token_id is None
    limit = request.sampling.max_tokens
    while len(told.answer) < limit:
        if opens and params.steps and think(row, step, told):
            limit = params.switch.answer_tokens
        at = row.look(0, request.sampling.seed)
        token = say(at)
        told.answer.append(token)
        row.feed(step(at).vector if params.mixture.in_answer else parts.table[token])
        opens = token == params.enter_token_id and len(told.lengths) < params.max_blocks
    return told
