"""When a thinking phase ends by itself: small rules, of which the first that holds decides.

A new rule is a class and a line in RULES. Rules look at all rows that asked for them at once and
never wait for the device; the step count always caps the phase (decide.py).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

from coconut_serve.params import MAX_STOP_TOKENS, ConvergeMetric, HaltParams, ReasoningParams
from coconut_serve.reasoning import mixing, noise
from coconut_serve.reasoning.slots import Slots, index_of, take_both
from coconut_serve.types import HaltReason


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What rules see of the rows that asked for them."""

    slots: Slots
    row_slots: Tensor  # [num_rows] int64
    logits: Tensor | None  # [num_rows, vocab_size] float32, bias and penalties applied
    raw_logits: Tensor | None  # without those: a token that is never said may still end a phase
    token: Tensor  # [num_rows] int64, the text of the step
    has_text: bool  # False: the mode's steps have none
    vector: Tensor | None  # [num_rows, hidden_size], what would be fed

    @property
    def is_first(self) -> Tensor:
        """Whether it is the first step of a phase; [num_rows] bool."""
        return self.slots.steps_left[self.row_slots] == self.slots.block_steps[self.row_slots]

    def uniform(self) -> Tensor:
        """One number in (0, 1) for each row; [num_rows]."""
        slots, rows = self.slots, self.row_slots
        column = torch.zeros(1, 1, dtype=torch.int64, device=rows.device)
        drawn = noise.uniform(
            slots.seed[rows], slots.num_decisions[rows], noise.HALT_STREAM, column
        )
        return drawn.squeeze(1)


class Rule(ABC):
    """One reason to end a phase."""

    reason: ClassVar[HaltReason]

    def __init__(self, slots: Slots) -> None:
        self._slots = slots

    def _buffer(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        return self._slots.register(f"{type(self).__name__}_{name}", dtype, *shape)

    @staticmethod
    @abstractmethod
    def is_asked(halt: HaltParams) -> bool:
        """Whether a request has this rule on."""

    @abstractmethod
    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Set the rule's buffers for a new sequence."""

    @abstractmethod
    def holds(self, view: View) -> Tensor:
        """Decide for each row; [num_rows] bool."""

    def _lasts(self, count: Tensor, patience: Tensor, view: View, is_hit: Tensor) -> Tensor:
        """Whether a condition has held for `patience` steps of a phase; counts in `count`."""
        rows = view.row_slots
        before = torch.where(view.is_first, 0, count[rows])
        count[rows] = torch.where(is_hit, before + 1, 0)
        return count[rows] >= patience[rows]


class StopToken(Rule):
    """The text of the step is a stop token; without text, what the logits give is one.

    Drawing a token and looking whether it is a stop token is done by drawing that alone.
    """

    reason = HaltReason.STOP_TOKEN

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._ids = self._buffer("ids", torch.int64, MAX_STOP_TOKENS)  # padded with -2
        self._is_argmax = self._buffer("is_argmax", torch.bool)
        self._is_sampled = self._buffer("is_sampled", torch.bool)
        self._temperature = self._buffer("temperature", torch.float32)

    @staticmethod
    def is_asked(halt: HaltParams) -> bool:
        """Whether there are stop tokens."""
        return bool(halt.stop_token_ids)

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the tokens and the test."""
        halt = params.halt
        self._ids[slot] = -2
        for i, token_id in enumerate(dict.fromkeys(halt.stop_token_ids)):
            self._ids[slot, i] = token_id
        self._is_argmax[slot] = halt.stop_test == "argmax"
        self._is_sampled[slot] = halt.stop_test == "sampled"
        self._temperature[slot] = halt.stop_temperature

    def holds(self, view: View) -> Tensor:
        """Compare."""
        rows = view.row_slots
        if view.has_text:
            return self._is_stop(view.token, rows)
        assert view.raw_logits is not None
        likeliest = self._is_stop(view.raw_logits.argmax(-1), rows) & self._is_argmax[rows]
        return torch.where(self._is_sampled[rows], view.uniform() < self._mass(view), likeliest)

    def _is_stop(self, token: Tensor, rows: Tensor) -> Tensor:
        return (token.unsqueeze(1) == self._ids[rows]).any(1)

    def _mass(self, view: View) -> Tensor:
        """The probability of all stop tokens together; [num_rows] float32."""
        assert view.raw_logits is not None
        ids = self._ids[view.row_slots]  # [num_rows, MAX_STOP_TOKENS]
        log_probs = view.raw_logits / self._temperature[view.row_slots].unsqueeze(1)
        probs = log_probs.softmax(-1).gather(1, ids.clamp_min(0))
        return torch.where(ids >= 0, probs, 0.0).sum(1)


class LikelyStop(StopToken):
    """The stop tokens together are likely enough, whatever the text of the step is."""

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._least = self._buffer("least", torch.float32)

    @staticmethod
    def is_asked(halt: HaltParams) -> bool:
        """Whether there are stop tokens, and a probability is what counts."""
        return bool(halt.stop_token_ids) and halt.stop_test == "prob"

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the tokens and the threshold."""
        super().admit(slot, params)
        self._least[slot] = params.halt.stop_prob

    def holds(self, view: View) -> Tensor:
        """Compare the probability with the threshold."""
        return self._mass(view) >= self._least[view.row_slots]


class Learned(Rule):
    """Two rows of the output head say go on or stop (adaptive latent reasoning, 2511.21581)."""

    reason = HaltReason.LEARNED

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._ids = self._buffer("ids", torch.int64, 2)  # continue, stop
        self._temperature = self._buffer("temperature", torch.float32)
        self._least = self._buffer("least", torch.float32)
        self._is_sampled = self._buffer("is_sampled", torch.bool)

    @staticmethod
    def is_asked(halt: HaltParams) -> bool:
        """Whether the rows are named."""
        return bool(halt.learned_token_ids)

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the rows and the threshold."""
        halt = params.halt
        for i, token_id in enumerate(halt.learned_token_ids):
            self._ids[slot, i] = token_id
        self._temperature[slot] = halt.stop_temperature
        self._least[slot] = halt.stop_prob
        self._is_sampled[slot] = halt.sample

    def holds(self, view: View) -> Tensor:
        """Compare the probability of stopping with the threshold, or draw."""
        assert view.raw_logits is not None
        rows = view.row_slots
        pair = view.raw_logits.gather(1, self._ids[rows]) / self._temperature[rows].unsqueeze(1)
        stop = pair.softmax(-1)[:, 1]
        return torch.where(self._is_sampled[rows], view.uniform() < stop, stop >= self._least[rows])


class Entropy(Rule):
    """The entropy of the next-token distribution is on one side of a bound.

    Taken at the mixture's temperature, before its filters, as Soft Thinking does.
    """

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._temperature = self._buffer("temperature", torch.float32)
        self._bound = self._buffer("bound", torch.float32)  # nats, or a share of ln vocab_size
        self._is_share = self._buffer("is_share", torch.bool)
        self._count = self._buffer("count", torch.int64)
        self._patience = self._buffer("patience", torch.int64)

    def _admit(self, slot: int, params: ReasoningParams, bound: float, patience: int) -> None:
        is_soft = params.mode == "distribution"
        self._temperature[slot] = params.mixture.temperature if is_soft else 1.0
        self._bound[slot] = bound
        self._is_share[slot] = params.halt.entropy_unit == "normalized"
        self._patience[slot] = patience

    def _distance(self, view: View) -> Tensor:
        """Entropy minus bound; [num_rows] float32."""
        assert view.logits is not None
        rows = view.row_slots
        log_probs = (view.logits / self._temperature[rows].unsqueeze(1)).log_softmax(-1)
        whole = log(view.logits.shape[1])
        found = mixing.entropy(log_probs)
        return found / torch.where(self._is_share[rows], whole, 1.0) - self._bound[rows]


class ColdStop(Entropy):
    """The model has been certain for some steps (Soft Thinking, arXiv 2505.15778)."""

    reason = HaltReason.COLD_STOP

    @staticmethod
    def is_asked(halt: HaltParams) -> bool:
        """Whether there is a lower bound."""
        return halt.entropy_below > 0

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the bound."""
        halt = params.halt
        self._admit(slot, params, halt.entropy_below, halt.entropy_patience)

    def holds(self, view: View) -> Tensor:
        """Count steps below the bound."""
        return self._lasts(self._count, self._patience, view, self._distance(view) < 0)


class Uncertain(Entropy):
    """The model is too uncertain to go on (LaTER, training-free, arXiv 2605.07315)."""

    reason = HaltReason.UNCERTAIN

    @staticmethod
    def is_asked(halt: HaltParams) -> bool:
        """Whether there is an upper bound."""
        return halt.entropy_above > 0

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the bound."""
        self._admit(slot, params, params.halt.entropy_above, 1)

    def holds(self, view: View) -> Tensor:
        """Look at this step alone."""
        return self._distance(view) > 0


class Converged(Rule):
    """Steps stopped changing (exit criteria of recurrent depth, arXiv 2502.05171)."""

    reason = HaltReason.CONVERGED
    metrics: ClassVar[tuple[ConvergeMetric, ...]]

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._bound = self._buffer("bound", torch.float32)
        self._count = self._buffer("count", torch.int64)
        self._patience = self._buffer("patience", torch.int64)

    @classmethod
    def is_asked(cls, halt: HaltParams) -> bool:
        """Whether one of its metrics is chosen."""
        return halt.converge_metric in cls.metrics

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note the bound."""
        self._bound[slot] = params.halt.converge_below
        self._patience[slot] = params.halt.converge_patience

    def holds(self, view: View) -> Tensor:
        """Count steps that are near the one before."""
        is_near = self._is_near(view) & ~view.is_first
        return self._lasts(self._count, self._patience, view, is_near)

    @abstractmethod
    def _is_near(self, view: View) -> Tensor:
        """Compare with the step before, and keep what the next one is compared with."""


class SameVector(Converged):
    """The vector that would be fed is near the one before.

    cosine: 1 - cos; rel_l2: |new - old| / |old|.
    """

    metrics = ("cosine", "rel_l2")

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._is_cosine = self._buffer("is_cosine", torch.bool)

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note metric and bound."""
        super().admit(slot, params)
        self._is_cosine[slot] = params.halt.converge_metric == "cosine"

    def _is_near(self, view: View) -> Tensor:
        assert view.vector is not None, "ReasoningParams lets no other mode through"
        rows, slots = view.row_slots, view.slots
        new, old = view.vector.float(), slots.vector[rows].float()
        angle = 1 - torch.cosine_similarity(new, old, dim=-1)
        relative = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-12)
        is_near = torch.where(self._is_cosine[rows], angle, relative) < self._bound[rows]
        return is_near & slots.is_vector[rows]  # there is a vector before this one


class SameToken(Converged):
    """The likeliest token stays."""

    metrics = ("argmax_stable",)

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._likeliest = self._buffer("likeliest", torch.int64)

    def _is_near(self, view: View) -> Tensor:
        assert view.logits is not None
        new, old = view.logits.argmax(-1), self._likeliest[view.row_slots]
        self._likeliest[view.row_slots] = new
        return new == old


class SameDistribution(Converged):
    """The divergence KL(old | new) of the raw next-token distributions is below the bound."""

    metrics = ("kl",)
    # Made when the first request asks for it: it is as large as the logits.
    _log_probs: Tensor | None = None  # [num_slots, vocab_size] float32

    def _is_near(self, view: View) -> Tensor:
        assert view.raw_logits is not None
        rows, new = view.row_slots, view.raw_logits.log_softmax(-1)
        if self._log_probs is None:
            self._log_probs = self._buffer("log_probs", torch.float32, new.shape[1])
        old = self._log_probs[rows]
        self._log_probs[rows] = new
        return (old.exp() * (old - new)).sum(-1) < self._bound[rows]


RULES: tuple[type[Rule], ...] = (
    StopToken, LikelyStop, Learned, ColdStop, Uncertain, SameVector, SameToken, SameDistribution,
)  # fmt: skip


class Controller:
    """Asks the rules that rows have on, in order."""

    def __init__(self, slots: Slots) -> None:
        self._rules = [rule(slots) for rule in RULES]
        self._min_left = slots.register("min_steps_left", torch.int64)
        self._min_steps = slots.register("min_steps", torch.int64)
        self._asked: list[tuple[bool, ...]] = [()] * slots.num_slots  # by slot, for each rule

    def admit(self, slot: int, params: ReasoningParams) -> None:
        """Note which rules a sequence has on and set those up."""
        asked = tuple(rule.is_asked(params.halt) for rule in self._rules)
        for rule, is_asked in zip(self._rules, asked, strict=True):
            if is_asked:
                rule.admit(slot, params)
        self._min_left[slot] = self._min_steps[slot] = params.min_steps
        self._asked[slot] = asked

    def restart(self, row_slots: Tensor, opens: Tensor) -> None:
        """Count `min_steps` anew where a block opens; [num_rows] int64, [num_rows] bool."""
        left, whole = self._min_left[row_slots], self._min_steps[row_slots]
        self._min_left[row_slots] = torch.where(opens, whole, left)

    def check(self, view: View, host_slots: tuple[int, ...]) -> Tensor | None:
        """Find the first rule that holds for each row.

        Args:
            view: The rows.
            host_slots: Their slots, on the host.

        Returns:
            [num_rows] int64, a HaltReason, 0 to go on; None if no row has a rule.
        """
        if not any(any(self._asked[slot]) for slot in host_slots):
            return None
        rows = view.row_slots
        halt = torch.zeros_like(rows)
        for i, rule in enumerate(self._rules):
            members = [k for k, slot in enumerate(host_slots) if self._asked[slot][i]]
            if not members:
                continue
            at = index_of(members, rows.device)
            holds = torch.zeros_like(rows, dtype=torch.bool)
            holds[at] = rule.holds(_take(view, at))
            halt = torch.where((halt == 0) & holds, int(rule.reason), halt)
        is_early = self._min_left[rows] > 0
        self._min_left[rows] -= 1
        return torch.where(is_early, 0, halt)


def _take(view: View, at: slice | Tensor) -> View:
    logits, raw_logits = take_both(view.logits, view.raw_logits, at)
    return View(
        slots=view.slots,
        row_slots=view.row_slots[at],
        logits=logits,
        raw_logits=raw_logits,
        token=view.token[at],
        has_text=view.has_text,
        vector=view.vector[at] if view.vector is not None else None,
    )
