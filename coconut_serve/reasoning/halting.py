"""When a thinking phase ends by itself: small rules, of which the first that holds decides.

A new rule is a class and a line in RULES. Rules look at all rows that asked for them at once and
never wait for the device; the step count always caps the phase (decide.py).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from coconut_serve.params import ConvergeMetric, HaltParams
from coconut_serve.reasoning import mixing, noise
from coconut_serve.reasoning.settings import Rows, choice
from coconut_serve.reasoning.slots import Slots, index_of, take_both
from coconut_serve.types import HaltReason

_STOP_TEST = {name: choice(HaltParams, "stop_test", name) for name in ("argmax", "sampled", "prob")}
_METRIC = {
    name: choice(HaltParams, "converge_metric", name)
    for name in ("cosine", "rel_l2", "kl", "argmax_stable")
}
_NORMALIZED = choice(HaltParams, "entropy_unit", "normalized")


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
    is_tempered: bool = False  # True: entropy is taken at the mixture's temperature

    @property
    def settings(self) -> Rows[Tensor]:
        """What each row asks for."""
        return self.slots.settings(self.row_slots)

    @property
    def is_first(self) -> Tensor:
        """Whether it is the first step of a phase; [num_rows] bool."""
        return self.slots.steps_left[self.row_slots] == self.settings.steps

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

    @staticmethod
    @abstractmethod
    def is_asked(host: Rows[np.ndarray]) -> np.ndarray:
        """Which rows have this rule on; [num_rows] bool."""

    @abstractmethod
    def holds(self, view: View) -> Tensor:
        """Decide for each row; [num_rows] bool."""

    def _count(self) -> Tensor:
        """Register the steps for which a condition has held."""
        return self._slots.register(f"{type(self).__name__}_count", torch.int64)

    @staticmethod
    def _lasts(count: Tensor, patience: Tensor, view: View, is_hit: Tensor) -> Tensor:
        """Whether a condition has held for `patience` steps of a phase; counts in `count`."""
        rows = view.row_slots
        before = torch.where(view.is_first, 0, count[rows])
        count[rows] = torch.where(is_hit, before + 1, 0)
        return count[rows] >= patience


class StopToken(Rule):
    """The text of the step is a stop token; without text, what the logits give is one.

    Sampling reduces to one draw against the stop tokens' total probability.
    """

    reason = HaltReason.STOP_TOKEN

    @staticmethod
    def is_asked(host: Rows[np.ndarray]) -> np.ndarray:
        """Whether there are stop tokens."""
        return host.stop_token_ids[:, 0] >= 0

    def holds(self, view: View) -> Tensor:
        """Compare."""
        settings = view.settings
        if view.has_text:
            return self._is_stop(view.token, view)
        assert view.raw_logits is not None
        is_likeliest = self._is_stop(view.raw_logits.argmax(-1), view)
        is_drawn = view.uniform() < self._mass(view)
        is_likeliest &= settings.stop_test == _STOP_TEST["argmax"]
        return torch.where(settings.stop_test == _STOP_TEST["sampled"], is_drawn, is_likeliest)

    @staticmethod
    def _is_stop(token: Tensor, view: View) -> Tensor:
        return (token.unsqueeze(1) == view.settings.stop_token_ids).any(1)

    @staticmethod
    def _mass(view: View) -> Tensor:
        """The probability of all stop tokens together; [num_rows] float32."""
        assert view.raw_logits is not None
        ids = view.settings.stop_token_ids  # [num_rows, MAX_STOP_TOKENS]
        log_probs = view.raw_logits / view.settings.stop_temperature.unsqueeze(1)
        probs = log_probs.softmax(-1).gather(1, ids.clamp_min(0))
        return torch.where(ids >= 0, probs, 0.0).sum(1)


class LikelyStop(StopToken):
    """The stop tokens together are likely enough, whatever the text of the step is."""

    @staticmethod
    def is_asked(host: Rows[np.ndarray]) -> np.ndarray:
        """Whether there are stop tokens, and a probability is what counts."""
        has_stops: np.ndarray = host.stop_token_ids[:, 0] >= 0
        has_stops &= host.stop_test == _STOP_TEST["prob"]
        return has_stops

    def holds(self, view: View) -> Tensor:
        """Compare the probability with the threshold."""
        return self._mass(view) >= view.settings.stop_prob


class Learned(Rule):
    """Two rows of the output head say go on or stop (adaptive latent reasoning, 2511.21581)."""

    reason = HaltReason.LEARNED

    @staticmethod
    def is_asked(host: Rows[np.ndarray]) -> np.ndarray:
        """Whether the rows are named."""
        return host.learned_token_ids[:, 0] >= 0

    def holds(self, view: View) -> Tensor:
        """Compare the probability of stopping with the threshold, or draw."""
        assert view.raw_logits is not None
        settings = view.settings
        pair = view.raw_logits.gather(1, settings.learned_token_ids)  # continue, stop
        stop = (pair / settings.stop_temperature.unsqueeze(1)).softmax(-1)[:, 1]
        return torch.where(settings.sample, view.uniform() < stop, stop >= settings.stop_prob)


class Entropy(Rule):
    """The entropy of the next-token distribution is on one side of a bound.

    Taken at the mixture's temperature, before its filters, as Soft Thinking does.
    """

    @staticmethod
    def _distance(view: View, bound: Tensor) -> Tensor:
        """Entropy minus bound, in nats or as shares of ln vocab_size; [num_rows] float32."""
        assert view.logits is not None
        logits, settings = view.logits, view.settings
        if view.is_tempered:
            logits = logits / settings.temperature.unsqueeze(1)
        found = mixing.entropy(logits.log_softmax(-1))
        is_share = settings.entropy_unit == _NORMALIZED
        return found / torch.where(is_share, log(logits.shape[1]), 1.0) - bound


class ColdStop(Entropy):
    """The model has been certain for some steps (Soft Thinking, arXiv 2505.15778)."""

    reason = HaltReason.COLD_STOP

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._num_cold = self._count()

    @staticmethod
    def is_asked(host: Rows[np.ndarray]) -> np.ndarray:
        """Whether there is a lower bound."""
        return host.entropy_below > 0

    def holds(self, view: View) -> Tensor:
        """Count steps below the bound."""
        settings = view.settings
        is_cold = self._distance(view, settings.entropy_below) < 0
        return self._lasts(self._num_cold, settings.entropy_patience, view, is_cold)


class Uncertain(Entropy):
    """The model is too uncertain to go on (LaTER, training-free, arXiv 2605.07315)."""

    reason = HaltReason.UNCERTAIN

    @staticmethod
    def is_asked(host: Rows[np.ndarray]) -> np.ndarray:
        """Whether there is an upper bound."""
        return host.entropy_above > 0

    def holds(self, view: View) -> Tensor:
        """Look at this step alone."""
        return self._distance(view, view.settings.entropy_above) > 0


class Converged(Rule):
    """Steps stopped changing (exit criteria of recurrent depth, arXiv 2502.05171)."""

    reason = HaltReason.CONVERGED
    metrics: ClassVar[tuple[ConvergeMetric, ...]]

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._num_near = self._count()

    @classmethod
    def is_asked(cls, host: Rows[np.ndarray]) -> np.ndarray:
        """Whether one of its metrics is chosen."""
        return np.isin(host.converge_metric, [_METRIC[metric] for metric in cls.metrics])

    def holds(self, view: View) -> Tensor:
        """Count steps that are near the one before."""
        is_near = self._is_near(view) & ~view.is_first
        return self._lasts(self._num_near, view.settings.converge_patience, view, is_near)

    @abstractmethod
    def _is_near(self, view: View) -> Tensor:
        """Compare with the step before, and keep what the next one is compared with."""


class SameVector(Converged):
    """The vector that would be fed is near the one before.

    cosine: 1 - cos; rel_l2: |new - old| / |old|.
    """

    metrics = ("cosine", "rel_l2")

    def _is_near(self, view: View) -> Tensor:
        assert view.vector is not None, "ReasoningParams lets no other mode through"
        rows, slots, settings = view.row_slots, view.slots, view.settings
        new, old = view.vector.float(), slots.vector[rows].float()
        angle = 1 - torch.cosine_similarity(new, old, dim=-1)
        relative = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-12)
        is_cosine = settings.converge_metric == _METRIC["cosine"]
        is_near = torch.where(is_cosine, angle, relative) < settings.converge_below
        return is_near & slots.is_vector[rows]  # there is a vector before this one


class SameToken(Converged):
    """The likeliest token stays."""

    metrics = ("argmax_stable",)

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._likeliest = slots.register("likeliest", torch.int64)

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
            self._log_probs = self._slots.register_large("log_probs", torch.float32, new.shape[1])
        old = self._log_probs[rows]
        self._log_probs[rows] = new
        return (old.exp() * (old - new)).sum(-1) < view.settings.converge_below


RULES: tuple[type[Rule], ...] = (
    StopToken, LikelyStop, Learned, ColdStop, Uncertain, SameVector, SameToken, SameDistribution,
)  # fmt: skip


class Controller:
    """Asks the rules that rows have on, in order."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._rules = [rule(slots) for rule in RULES]
        self._min_left = slots.register(
            "min_steps_left", torch.int64, start=lambda a: a.reasoning.min_steps
        )

    def restart(self, row_slots: Tensor, opens: Tensor) -> None:
        """Count `min_steps` anew where a block opens; [num_rows] int64, [num_rows] bool."""
        whole = self._slots.settings(row_slots).min_steps
        self._min_left[row_slots] = torch.where(opens, whole, self._min_left[row_slots])

    def check(self, view: View, host_slots: tuple[int, ...]) -> Tensor | None:
        """Find the first rule that holds for each row.

        Args:
            view: The rows.
            host_slots: Their slots, on the host.

        Returns:
            [num_rows] int64, a HaltReason, 0 to go on; None if no row has a rule.
        """
        host = self._slots.host(host_slots)
        if not host.may_halt.any():
            return None
        rows = view.row_slots
        halt = torch.zeros_like(rows)
        for rule in self._rules:
            members = np.flatnonzero(rule.is_asked(host)).tolist()
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
        is_tempered=view.is_tempered,
    )
