"""What a reasoning mode is: it decides the next input of its thinking rows, all at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from coconut_serve.params import ReasoningParams
from coconut_serve.reasoning import noise
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.slots import Slots, index_of, take_both


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What a mode sees: the rows of one step that are in its mode.

    Rows whose thinking is over may be among them; the step ignores what is decided for those.
    """

    slots: Slots
    row_slots: Tensor  # [num_rows] int64
    host_slots: tuple[int, ...]  # the same, for branches on what `admit` noted on the host
    hidden: Tensor  # [num_rows, hidden_size], after the final norm
    logits: Tensor | None  # [num_rows, vocab_size] float32, bias and penalties applied; None where
    # neither the mode nor a halting rule looks at them
    raw_logits: Tensor | None  # without bias, penalties and banned tokens; where no row has any,
    # `logits` itself
    sampled: Tensor  # [num_rows] int64, drawn as the row's thinking tokens are, -1 for none
    embedding: Embedding
    adapters: AdapterBank
    has_trace: bool = False  # whether some row is traced: `retained_mass` is looked at

    def select(self, members: list[int]) -> tuple["StepContext", slice | Tensor]:
        """Take some rows; also their index in a tensor of all."""
        at = index_of(members, self.row_slots.device)
        logits, raw_logits = take_both(self.logits, self.raw_logits, at)
        part = replace(
            self,
            row_slots=self.row_slots[at],
            host_slots=tuple(self.host_slots[i] for i in members),
            hidden=self.hidden[at],
            logits=logits,
            raw_logits=raw_logits,
            sampled=self.sampled[at],
        )
        return part, at

    def uniform(self, stream: int, columns: Tensor) -> Tensor:
        """Draw numbers in (0, 1) that depend on each row's seed alone; see noise.uniform."""
        slots, rows = self.slots, self.row_slots
        return noise.uniform(slots.seed[rows], slots.num_decisions[rows], stream, columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDecision:
    """What a mode decides for each of its rows.

    A halting row feeds its end tokens instead, or answers at once when it has none.
    """

    token: Tensor  # [num_rows] int64: the text of the step, -1 for none
    vector: Tensor | None = None  # [num_rows, hidden_size] fed next; None: feed `token`
    is_vector: Tensor | None = None  # [num_rows] bool; None: all rows if `vector` is given
    retained_mass: Tensor | None = None  # [num_rows] float32; None: 1
    is_switch: Tensor | None = None  # [num_rows] bool, tokens to vectors or back; None: nobody
    halt: Tensor | None = None  # [num_rows] int64, a HaltReason of the mode's own; None: nobody


Thought = Generator[Tensor, Tensor, StepDecision]
"""A decision that averages all embeddings on its way.

It yields weights, [num_means, vocab_size], and is sent the means, [num_means, hidden_size].
"""


def conclude(
    answers: Sequence[StepDecision | Thought], mean: Callable[[Tensor], Tensor]
) -> list[StepDecision]:
    """Finish what modes began; the means that they wait for at one time are one product.

    Args:
        answers: Of one mode each.
        mean: Embedding.mean.
    """
    done = {i: each for i, each in enumerate(answers) if isinstance(each, StepDecision)}
    thoughts = {i: each for i, each in enumerate(answers) if not isinstance(each, StepDecision)}
    sent: dict[int, Tensor | None] = dict.fromkeys(thoughts)
    while sent:
        asked: dict[int, Tensor] = {}
        for i, means in sent.items():
            try:
                asked[i] = thoughts[i].send(means)  # type: ignore[arg-type]  # None starts it
            except StopIteration as end:
                done[i] = end.value
        weights = list(asked.values())
        whole = mean(torch.cat(weights) if len(weights) > 1 else weights[0]) if weights else None
        sizes = [len(each) for each in weights]
        parts = torch.split(whole, sizes) if whole is not None else ()
        sent = dict(zip(asked, parts, strict=True))
    return [done[i] for i in range(len(answers))]


class ReasoningMode(ABC):
    """One way of thinking. It never sees requests, blocks, positions, HTTP or vLLM.

    `admit` sets every slot buffer the mode owns (slots are reused); buffers come from
    `Slots.register`, so preemption keeps them. `decide` runs once a step for all rows of the mode
    and must not wait for the device: no .item(), no .cpu(), no Python branch on a tensor.
    """

    name: ClassVar[str]
    feeds_vectors: ClassVar[bool] = True  # False: every input is the token that is reported
    has_text: ClassVar[bool] = True  # False: a step stands for no token
    takes_samples: ClassVar[bool] = False  # True: every step is the drawn token, whatever it is

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    @classmethod
    def needs_logits(cls, params: ReasoningParams) -> bool:
        """Whether thinking steps look at logits; False lets rows skip the output head."""
        return True

    @classmethod
    def thinks_on_logits(cls, params: ReasoningParams) -> bool:
        """Whether the mode or a halting rule looks at logits while a row thinks."""
        return cls.needs_logits(params) or params.halt.needs_logits(has_text=cls.has_text)

    @classmethod
    def needs_sampled(cls, params: ReasoningParams) -> bool:
        """Whether thinking steps draw a token."""
        return False

    def admit(self, slot: int, params: ReasoningParams) -> None:  # noqa: B027 (optional hook)
        """Set up the mode's own buffers for a new sequence."""

    @abstractmethod
    def decide(self, ctx: StepContext) -> StepDecision | Thought:
        """Decide the next input of each row."""


ProjectLogits = Callable[[Tensor], Tensor]  # [n, hidden_size] -> [n, vocab_size]
