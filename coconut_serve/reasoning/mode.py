"""The interface of reasoning modes: decide the next input of all thinking rows at once."""

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from coconut_serve.params import ReasoningParams
from coconut_serve.reasoning import noise
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.plan import Needs, StepClass
from coconut_serve.reasoning.registry import properties_of
from coconut_serve.reasoning.settings import Rows
from coconut_serve.reasoning.slots import Slots, index_of, take_both


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """What a mode sees: the rows of one step that are in its mode.

    They may include rows that no longer think; the step ignores the decisions about those.
    """

    slots: Slots
    row_slots: Tensor  # [num_rows] int64
    host_slots: tuple[int, ...]  # the same on the host
    hidden: Tensor  # [num_rows, hidden_size], after the final norm
    logits: Tensor | None  # [num_rows, vocab_size] float32, bias and penalties applied; None if
    # neither the mode nor a halting rule reads them
    raw_logits: Tensor | None  # without bias, penalties and bans; `logits` itself if no row has any
    sampled: Tensor  # [num_rows] int64, sampled with the settings for thinking, -1 for none
    embedding: Embedding
    adapters: AdapterBank
    has_trace: bool = False  # a traced row needs `retained_mass`

    @property
    def settings(self) -> Rows[Tensor]:
        """Each row's settings by field name; [num_rows] or [num_rows, n]."""
        return self.slots.settings(self.row_slots)

    @property
    def host(self) -> Rows[np.ndarray]:
        """Their host copies, to branch on: `if ctx.host.noise_std.any()`."""
        return self.slots.host(self.host_slots)

    @property
    def params(self) -> list[ReasoningParams]:
        """The same settings as one record a row."""
        return [self.slots.admitted[slot].reasoning for slot in self.host_slots]

    def select(self, members: list[int]) -> tuple["StepContext", slice | Tensor]:
        """Return the context of some rows, and their index in a tensor of all rows."""
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
        """Draw numbers in (0, 1) from each row's own seed; see noise.uniform."""
        slots, rows = self.slots, self.row_slots
        return noise.uniform(slots.seed[rows], slots.num_decisions[rows], stream, columns)


@dataclass(frozen=True, slots=True)
class Soft:
    """Vectors that need weighted means of all embeddings; a step computes all means at once."""

    weights: Tensor  # [num_rows, vocab_size] float32
    finish: Callable[[Tensor], Tensor]  # means, [num_rows, hidden_size] -> vectors of that shape

    def then(self, change: Callable[[Tensor], Tensor]) -> "Soft":
        """Apply another function to the finished vectors."""
        return Soft(self.weights, lambda means: change(self.finish(means)))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDecision:
    """What a mode decides for each of its rows.

    A halting row feeds its end tokens instead, or starts its answer if it has none.
    """

    token: Tensor  # [num_rows] int64: the text of the step, -1 for none
    vector: Tensor | Soft | None = None  # [num_rows, hidden_size] fed next; None: feed `token`
    is_vector: Tensor | None = None  # [num_rows] bool; None: all rows if `vector` is given
    retained_mass: Tensor | None = None  # [num_rows] float32; None: 1
    is_switch: Tensor | None = None  # [num_rows] bool, tokens to vectors or back; None: no row
    halt: Tensor | None = None  # [num_rows] int64, a HaltReason of the mode's own; None: no row


def settle(
    vectors: Sequence[Tensor | Soft | None], mean: Callable[[Tensor], Tensor]
) -> list[Tensor | None]:
    """Finish all soft vectors with one matrix product.

    Args:
        vectors: One for each decision.
        mean: Embedding.mean.
    """
    weights = [each.weights for each in vectors if isinstance(each, Soft)]
    if not weights:
        return [each for each in vectors if not isinstance(each, Soft)]
    means = mean(torch.cat(weights) if len(weights) > 1 else weights[0])
    parts = iter(torch.split(means, [len(each) for each in weights]))
    return [each.finish(next(parts)) if isinstance(each, Soft) else each for each in vectors]


def merge(parts: Sequence[tuple[slice | Tensor, StepDecision]], hidden: Tensor) -> StepDecision:
    """Merge decisions about parts of the rows into one about all rows.

    Args:
        parts: The index of each part's rows, and its decision, which must feed vectors.
        hidden: [num_rows, hidden_size], of all rows.
    """

    def joined(name: str, fill: float, dtype: torch.dtype) -> Tensor | None:
        values = [(at, getattr(decision, name)) for at, decision in parts]
        if all(value is None for _, value in values):
            return None
        whole = torch.full(hidden.shape[:1], fill, dtype=dtype, device=hidden.device)
        for at, value in values:
            if value is not None:
                whole[at] = value
        return whole

    vectors = [decision.vector for _, decision in parts]
    weights = [each.weights for each in vectors if isinstance(each, Soft)]

    def finish(means: Tensor) -> Tensor:
        split = iter(torch.split(means, [len(each) for each in weights]))
        whole = torch.zeros_like(hidden)
        for (at, _), each in zip(parts, vectors, strict=True):
            assert each is not None, "all parts feed vectors"
            vector = each.finish(next(split)) if isinstance(each, Soft) else each
            whole[at] = vector.to(whole.dtype)
        return whole

    token = joined("token", -1, torch.int64)
    assert token is not None
    return StepDecision(
        token=token,
        vector=Soft(torch.cat(weights), finish) if weights else finish(hidden[:0]),
        is_vector=joined("is_vector", 1, torch.bool),
        retained_mass=joined("retained_mass", 1, torch.float32),
        is_switch=joined("is_switch", 0, torch.bool),
        halt=joined("halt", 0, torch.int64),
    )


class ReasoningMode(ABC):
    """One way of thinking. It never sees requests, blocks, positions, HTTP or vLLM.

    A mode reads settings as columns (`ctx.settings`, `ctx.host`). It registers its state with the
    slots, which initialise it on admission and preserve it across preemptions. `decide` runs once
    a step for all rows of the mode and must not wait for the device: no .item(), no .cpu(), no
    Python branch on a tensor.
    """

    name: ClassVar[str]
    is_tempered: ClassVar[bool] = False  # True: entropy is taken at the mixture's temperature
    takes_samples: ClassVar[bool] = False  # True: every step feeds the sampled token

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    @classmethod
    def needs_logits(cls, params: ReasoningParams) -> bool:
        """Whether thinking steps read logits; False lets rows skip the output head."""
        return True

    @classmethod
    def needs_sampled(cls, params: ReasoningParams) -> bool:
        """Whether thinking steps sample a token."""
        return False

    @classmethod
    def step_class(cls, params: ReasoningParams) -> StepClass:
        """Return what the mode's kernels depend on; a step sorts its rows by it."""
        return (params.adapter,)

    @abstractmethod
    def decide(self, ctx: StepContext) -> StepDecision:
        """Decide the next input of each row."""


@functools.cache
def load_mode(name: str) -> type[ReasoningMode]:
    """Import the class of a mode.

    Raises:
        KeyError: No mode has this name.
    """
    module, _, attribute = properties_of(name).where.partition(":")
    loaded: type[ReasoningMode] = getattr(importlib.import_module(module), attribute)
    return loaded


def needs_of(params: ReasoningParams) -> Needs:
    """Return what thinking steps with these settings use."""
    mode, has_text = load_mode(params.mode), properties_of(params.mode).has_text
    return Needs(
        logits=mode.needs_logits(params) or params.halt.needs_logits(has_text=has_text),
        sampled=mode.needs_sampled(params),
        step_class=(params.mode, *mode.step_class(params)),
    )


ProjectLogits = Callable[[Tensor], Tensor]  # [n, hidden_size] -> [n, vocab_size]
