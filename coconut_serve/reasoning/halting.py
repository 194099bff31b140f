"""Rules that end a thinking phase early; the first that holds decides.

A new rule is a class and a line in RULES. A rule checks all its rows at once and never waits for
the device. The step count always caps the phase (decide.py).
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
    """What a rule sees of its rows."""

    slots: Slots
    row_slots: Tensor  # [num_rows] int64
    logits: Tensor | None  # [num_rows, vocab_size] float32, bias and penalties applied
    raw_logits: Tensor | None  # without those: a banned token may still end a phase
    token: Tensor  # [num_rows] int64, the text of the step
    has_text: bool  # False: the mode's steps have none
    vector: Tensor | None  # [num_rows, hidden_size], the next input
    is_tempered: bool = False  # True: entropy is taken at the mixture's temperature

    @property
    def settings(self) -> Rows[Tensor]:
        return self.slots.settings(self.row_slots)

    @property
    def is_first(self) -> Tensor:
        """Whether this is the first step of the phase; [num_rows] bool."""
        return self.slots.steps_left[self.row_slots] == self.settings.steps

    def uniform(self) -> Tensor:
        """Draw one number in (0, 1) for each row; [num_rows]."""
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
    def is_active(host: Rows[np.ndarray]) -> np.ndarray:
        """Tell which rows have this rule on; [num_rows] bool."""

    @abstractmethod
    def holds(self, view: View) -> Tensor:
        """Decide for each row; [num_rows] bool."""

    def _count(self) -> Tensor:
        """Register the number of steps in a row for which a condition has held."""
        return self._slots.register(f"{type(self).__name__}_count", torch.int64)

    @staticmethod
    def _lasts(count: Tensor, patience: Tensor, view: View, is_hit: Tensor) -> Tensor:
        """Update `count`; whether the condition has held for the last `patience` steps."""
        rows = view.row_slots
        before = torch.where(view.is_first, 0, count[rows])
        count[rows] = torch.where(is_hit, before + 1, 0)
        return count[rows] >= patience


class StopToken(Rule):
    """The text of the step is a stop token; without text, the argmax or a sample is.

    Sampling reduces to one Bernoulli draw on the stop tokens' total probability.
    """

    reason = HaltReason.STOP_TOKEN

    @staticmethod
    def is_active(host: Rows[np.ndarray]) -> np.ndarray:
        return host.stop_token_ids[:, 0] >= 0

    def holds(self, view: View) -> Tensor:
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
        """Sum the probabilities of the stop tokens; [num_rows] float32."""
        assert view.raw_logits is not None
        ids = view.settings.stop_token_ids  # [num_rows, MAX_STOP_TOKENS]
        log_probs = view.raw_logits / view.settings.stop_temperature.unsqueeze(1)
        probs = log_probs.softmax(-1).gather(1, ids.clamp_min(0))
        return torch.where(ids >= 0, probs, 0.0).sum(1)


class LikelyStop(StopToken):
    """The stop tokens' total probability reaches `stop_prob`, whatever the text of the step."""

    @staticmethod
    def is_active(host: Rows[np.ndarray]) -> np.ndarray:
        has_stops: np.ndarray = host.stop_token_ids[:, 0] >= 0
        has_stops &= host.stop_test == _STOP_TEST["prob"]
        return has_stops

    def holds(self, view: View) -> Tensor:
        return self._mass(view) >= view.settings.stop_prob


class Learned(Rule):
    """Two rows of the output head vote to continue or stop (adaptive reasoning, 2511.21581)."""

    reason = HaltReason.LEARNED

    @staticmethod
    def is_active(host: Rows[np.ndarray]) -> np.ndarray:
        return host.learned_token_ids[:, 0] >= 0

    def holds(self, view: View) -> Tensor:
        assert view.raw_logits is not None
        settings = view.settings
        pair = view.raw_logits.gather(1, settings.learned_token_ids)  # continue, stop
        stop = (pair / settings.stop_temperature.unsqueeze(1)).softmax(-1)[:, 1]
        return torch.where(settings.sample, view.uniform() < stop, stop >= settings.stop_prob)


class Entropy(Rule):
    """Compares the entropy of the next-token distribution with a bound.

    In tempered modes it is taken at the mixture's temperature, before its filters, as in Soft
    Thinking.
    """

    @staticmethod
    def _distance(view: View, bound: Tensor) -> Tensor:
        """Compute entropy minus bound, in nats or divided by ln vocab_size; [num_rows] float32."""
        assert view.logits is not None
        logits, settings = view.logits, view.settings
        if view.is_tempered:
            logits = logits / settings.temperature.unsqueeze(1)
        found = mixing.entropy(logits.log_softmax(-1))
        is_share = settings.entropy_unit == _NORMALIZED
        return found / torch.where(is_share, log(logits.shape[1]), 1.0) - bound


class ColdStop(Entropy):
    """The last `entropy_patience` steps were certain (Soft Thinking, arXiv 2505.15778)."""

    reason = HaltReason.COLD_STOP

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._num_cold = self._count()

    @staticmethod
    def is_active(host: Rows[np.ndarray]) -> np.ndarray:
        return host.entropy_below > 0

    def holds(self, view: View) -> Tensor:
        settings = view.settings
        is_cold = self._distance(view, settings.entropy_below) < 0
        return self._lasts(self._num_cold, settings.entropy_patience, view, is_cold)


class Uncertain(Entropy):
    """This step is too uncertain to go on (LaTER, training-free, arXiv 2605.07315)."""

    reason = HaltReason.UNCERTAIN

    @staticmethod
    def is_active(host: Rows[np.ndarray]) -> np.ndarray:
        return host.entropy_above > 0

    def holds(self, view: View) -> Tensor:
        return self._distance(view, view.settings.entropy_above) > 0


class Converged(Rule):
    """Steps stopped changing (exit criteria of recurrent depth, arXiv 2502.05171)."""

    reason = HaltReason.CONVERGED
    metrics: ClassVar[tuple[ConvergeMetric, ...]]

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self._num_near = self._count()

    @classmethod
    def is_active(cls, host: Rows[np.ndarray]) -> np.ndarray:
        return np.isin(host.converge_metric, [_METRIC[metric] for metric in cls.metrics])

    def holds(self, view: View) -> Tensor:
        is_near = self._is_near(view) & ~view.is_first
        return self._lasts(self._num_near, view.settings.converge_patience, view, is_near)

    @abstractmethod
    def _is_near(self, view: View) -> Tensor:
        """Compare with the previous step, and store what the next step compares with."""


class SameVector(Converged):
    """The next input vector is close to the previous one.

    cosine: 1 - cos; rel_l2: |new - old| / |old|.
    """

    metrics = ("cosine", "rel_l2")

    def _is_near(self, view: View) -> Tensor:
        assert view.vector is not None, "check_params lets no other mode through"
        rows, slots, settings = view.row_slots, view.slots, view.settings
        new, old = view.vector.float(), slots.vector[rows].float()
        angle = 1 - torch.cosine_similarity(new, old, dim=-1)
        relative = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_min(1e-12)
        is_cosine = settings.converge_metric == _METRIC["cosine"]
        is_near = torch.where(is_cosine, angle, relative) < settings.converge_below
        return is_near & slots.is_vector[rows]  # else there is no previous vector


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
    # Allocated for the first request that needs it: it is as large as the logits.
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
    """Checks the active rules of each row, in order."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._rules = [rule(slots) for rule in RULES]
        self._min_left = slots.register(
            "min_steps_left", torch.int64, start=lambda a: a.reasoning.min_steps
        )

    def restart(self, row_slots: Tensor, opens: Tensor) -> None:
        """Reset the `min_steps` count where a block opens; [num_rows] int64, [num_rows] bool."""
        whole = self._slots.settings(row_slots).min_steps
        self._min_left[row_slots] = torch.where(opens, whole, self._min_left[row_slots])

    def check(self, view: View, host_slots: tuple[int, ...]) -> Tensor | None:
        """Find the first rule that holds for each row.

        Args:
            view: The rows.
            host_slots: Their slots, on the host.

        Returns:
            [num_rows] int64, a HaltReason, 0 to continue; None if no row has a rule.
        """
        host = self._slots.host(host_slots)
        if not host.may_halt.any():
            return None
        rows = view.row_slots
        halt = torch.zeros_like(rows)
        for rule in self._rules:
            members = np.flatnonzero(rule.is_active(host)).tolist()
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
