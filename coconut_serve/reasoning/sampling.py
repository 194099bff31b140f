"""Batched sampling in which each row's token depends on that row alone.

Every operation works along the vocabulary, and noise comes from the row's own seed (noise.py).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coconut_serve.params import MAX_BAD_WORD_TOKENS
from coconut_serve.reasoning import noise
from coconut_serve.reasoning.settings import Admission, Rows
from coconut_serve.reasoning.slots import Slots, index_of, upload

_NUM_CANDIDATES = 512  # likeliest tokens tried before sorting the whole vocabulary (CPU)


class LogitChange(NamedTuple):
    """A number to add to one logit; with `until`, only while min_tokens forbids stop tokens."""

    row: int
    token_id: int
    value: float
    until: int | None = None


def min_tokens_changes(
    row: int, stop_token_ids: Iterable[int], min_tokens: int
) -> list[LogitChange]:
    """Forbid a row's stop tokens until its answer has `min_tokens` tokens."""
    ids = stop_token_ids if min_tokens else ()
    return [LogitChange(row, i, -torch.inf, min_tokens) for i in ids]


def apply_changes(
    logits: Tensor, changes: list[LogitChange], slots: Slots, row_slots: Tensor
) -> Tensor:
    """Add the changes to the logits.

    Args:
        logits: [num_rows, vocab_size] float32; not modified.
        changes: In any order.
        slots: Hold the rows' counters.
        row_slots: [num_rows] int64.

    Returns:
        [num_rows, vocab_size] float32, `logits` itself if there are no changes.
    """
    if not changes:
        return logits
    rows, ids, values, until = zip(*changes, strict=True)
    at, column = upload(rows, logits.device), upload(ids, logits.device)  # [num_changes]
    added = upload(values, logits.device, logits.dtype)
    if any(bound is not None for bound in until):
        is_timed = upload([bound is not None for bound in until], logits.device, torch.bool)
        bounds = upload([bound or 0 for bound in until], logits.device)
        is_over = is_timed & ~slots.forbids_stops(row_slots[at], bounds)
        added = torch.where(is_over, 0.0, added)
    return logits.index_put((at, column), added, accumulate=True)


class TokenSampler:
    """Samples tokens with each slot's temperature, filters and seed.

    Args:
        slots: The engine's slots.
        name: The sampling settings to read: answer or thinking.
    """

    def __init__(self, slots: Slots, name: str) -> None:
        self._slots = slots
        self._prefix = f"{name}_"

    def _settings(self, row_slots: Tensor) -> Rows[Tensor]:
        return self._slots.settings(row_slots, self._prefix)

    def sample(
        self, logits: Tensor, row_slots: Tensor, host_slots: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Sample one token for each row.

        Args:
            logits: [num_rows, vocab_size] float32, adjusted.
            row_slots: [num_rows] int64.
            host_slots: The same on the host.

        Returns:
            [num_rows] int64; [num_rows] bool, whether the sample is invalid: the logits have NaN
            or Inf, or every token is forbidden.
        """
        host = self._slots.host(host_slots, self._prefix)
        drawn = logits.argmax(-1)  # of NaN, if there is one
        is_bad = ~logits.gather(1, drawn.unsqueeze(1)).squeeze(1).isfinite()
        random = np.flatnonzero(~host.is_greedy & ~host.has_filters).tolist()
        filtered = np.flatnonzero(~host.is_greedy & host.has_filters).tolist()
        for indices, draw in ((random, self._draw), (filtered, self._draw_filtered)):
            if indices:
                rows = index_of(indices, logits.device)
                drawn[rows] = draw(logits[rows], row_slots[rows])
        return drawn, is_bad

    def _probs(self, logits: Tensor, row_slots: Tensor) -> Tensor:
        return (logits / self._settings(row_slots).temperature.unsqueeze(1)).softmax(-1)

    def _uniform(self, row_slots: Tensor, columns: Tensor) -> Tensor:
        """Draw this decision's numbers in (0, 1); [num_rows, width]."""
        counter = self._slots.num_decisions[row_slots]
        return noise.uniform(self._settings(row_slots).seed, counter, noise.SAMPLE_STREAM, columns)

    def _draw(self, logits: Tensor, row_slots: Tensor) -> Tensor:
        """Invert the cumulative distribution over the whole vocabulary."""
        cumulative = self._probs(logits, row_slots).double().cumsum(-1)
        column = torch.zeros(1, 1, dtype=torch.int64, device=logits.device)
        target = self._uniform(row_slots, column).double() * cumulative[:, -1:]
        return (cumulative <= target).sum(-1).clamp_max(cumulative.shape[1] - 1)

    def _draw_filtered(self, logits: Tensor, row_slots: Tensor) -> Tensor:
        """Sample from the tokens that top-k, then top-p, then min-p leave."""
        probs = self._probs(logits, row_slots)
        if probs.is_cuda or probs.shape[1] <= _NUM_CANDIDATES:
            p, ids = probs.sort(dim=-1, descending=True, stable=True)
            return self._draw_sorted(p, ids, row_slots)
        # On the CPU a partial sort is many times cheaper, and reading its result needs no sync.
        # Each row decides for itself, so the batch does not change how its ties are ordered.
        p, ids = probs.topk(_NUM_CANDIDATES, dim=-1)
        settings = self._settings(row_slots)
        top_k, top_p = settings.top_k, settings.top_p
        is_enough = ((top_k > 0) & (top_k <= _NUM_CANDIDATES)) | (
            (top_k == 0) & (p.sum(-1) >= top_p + 1e-4)
        )
        drawn = self._draw_sorted(p, ids, row_slots)
        rest = (~is_enough).nonzero().squeeze(1)
        if rest.numel():
            p, ids = probs[rest].sort(dim=-1, descending=True, stable=True)
            drawn[rest] = self._draw_sorted(p, ids, row_slots[rest])
        return drawn

    def _draw_sorted(self, p: Tensor, ids: Tensor, row_slots: Tensor) -> Tensor:
        """Filter and sample from probabilities [num_rows, width] in descending order.

        Takes the largest ln p + Gumbel noise. The noise belongs to the token, so rounding that
        swaps ranks or moves a token across a bound matters only if that token would win.
        """
        settings = self._settings(row_slots)
        top_k, top_p = settings.top_k.unsqueeze(1), settings.top_p.unsqueeze(1)
        rank = torch.arange(p.shape[1], device=p.device)
        p = torch.where((top_k > 0) & (rank >= top_k), 0.0, p)
        mass = torch.where(top_k > 0, p.sum(-1, keepdim=True), 1.0)
        is_kept = (p.cumsum(-1) - p) < top_p * mass  # the token that crosses top_p stays
        is_kept &= p >= settings.min_p.unsqueeze(1) * p[:, :1]
        is_kept[:, 0] = True  # however small top_p is
        noise_of_ids = noise.gumbel(self._uniform(row_slots, ids))
        scores = torch.where(is_kept, p.log() + noise_of_ids, -torch.inf)
        return ids.gather(1, scores.argmax(-1, keepdim=True)).squeeze(1)


class BadWords:
    """Keeps rows from completing forbidden token sequences (vLLM's bad_words).

    Forbids the last token of a sequence when the row's latest tokens, thoughts and forced tokens
    included, are those before it. A step without text interrupts every sequence.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._said: Tensor | None = None  # [num_slots, MAX_BAD_WORD_TOKENS] int64, latest last;
        # -1: no token. Allocated for the first request with bad words

    def _words(self, slot: int) -> tuple[tuple[int, ...], ...]:
        return self._slots.admitted[slot].sampling.bad_words

    def clear(self, admissions: Sequence[Admission]) -> None:
        """Forget the tokens of the slots' previous sequences."""
        for each in admissions:
            if each.sampling.bad_words:
                if self._said is None:
                    self._said = self._slots.register_large(
                        "said", torch.int64, MAX_BAD_WORD_TOKENS
                    )
                self._said[each.slot] = -1

    def forbid(self, logits: Tensor, row_slots: Tensor, host_slots: tuple[int, ...]) -> Tensor:
        """Forbid tokens that would complete a sequence; arguments as in AnswerSampler.adjust."""
        found = [(row, word) for row, slot in enumerate(host_slots) for word in self._words(slot)]
        if not found or self._said is None:
            return logits
        width = max(len(word) for _, word in found) - 1
        # Beginnings are padded in front with -2, which matches anything.
        begins = [(-2,) * (width + 1 - len(word)) + word[:-1] for _, word in found]
        begin = upload([i for each in begins for i in each], logits.device).view(len(found), width)
        rows = upload([row for row, _ in found], logits.device)  # [num_words]
        last = upload([word[-1] for _, word in found], logits.device)
        said = self._said[row_slots[rows], MAX_BAD_WORD_TOKENS - width :]  # [num_words, width]
        is_said = ((said == begin) | (begin == -2)).all(-1)
        added = torch.where(is_said, -torch.inf, 0.0)
        return logits.index_put((rows, last), added, accumulate=True)

    def record(self, row_slots: Tensor, host_slots: tuple[int, ...], tokens: Tensor) -> None:
        """Record each row's token; [num_rows] int64, -1 for a step without text."""
        if self._said is None or not any(map(self._words, host_slots)):
            return
        kept = self._said[row_slots][:, 1:]
        self._said[row_slots] = torch.cat([kept, tokens.unsqueeze(1)], dim=1)


class AnswerSampler(TokenSampler):
    """Samples answer tokens after adjusting the logits; counts tokens for the penalties."""

    def __init__(self, slots: Slots, vocab_size: int) -> None:
        super().__init__(slots, "answer")
        self._shape = slots.num_slots, vocab_size
        # Allocated for the first request with penalties: they are as large as the logits.
        self._counts: Tensor | None = None  # [num_slots, vocab_size] int32, emitted tokens
        self._is_in_prompt: Tensor | None = None  # [num_slots, vocab_size] bool
        self._is_allowed: Tensor | None = None  # the same, for allowed_token_ids
        self.bad_words = BadWords(slots)

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Set up the slots of all sequences that a step admits."""
        self.bad_words.clear(admissions)
        penalised = [each for each in admissions if each.sampling.has_penalties]
        bounded = [each for each in admissions if each.sampling.allowed_token_ids]
        if penalised and self._counts is None:
            self._counts = self._slots.register_large("token_counts", torch.int32, self._shape[1])
        for each in penalised:  # before a snapshot restores its own counts
            assert self._counts is not None
            self._counts[each.slot] = 0
        prompts = self._flat_ids(penalised, lambda each: each.prompt_token_ids)
        allowed = self._flat_ids(bounded, lambda each: each.sampling.allowed_token_ids)
        in_prompt, is_fit = self._slots.admit(admissions, (prompts, allowed))
        self._is_in_prompt = self._mark(self._is_in_prompt, penalised, in_prompt)
        self._is_allowed = self._mark(self._is_allowed, bounded, is_fit)

    def _flat_ids(
        self, admissions: Sequence[Admission], ids: Callable[[Admission], tuple[int, ...]]
    ) -> list[int]:
        """Return the indices of the slots' ids in a flat [num_slots, vocab_size]."""
        size = self._shape[1]
        return [each.slot * size + i for each in admissions for i in ids(each)]

    def _mark(
        self, mask: Tensor | None, admissions: Sequence[Admission], at: Tensor
    ) -> Tensor | None:
        """Set the slots' rows of a mask at the given ids only; allocates the mask on first use."""
        if not admissions:
            return mask
        if mask is None:
            mask = torch.zeros(self._shape, dtype=torch.bool, device=at.device)
        for each in admissions:
            mask[each.slot] = False
        mask.view(-1).index_fill_(0, at, 1)
        return mask

    def adjust(self, logits: Tensor, row_slots: Tensor, host_slots: tuple[int, ...]) -> Tensor:
        """Apply allowed ids, penalties, logit bias, banned ids, bad words and min_tokens.

        Args:
            logits: [num_rows, vocab_size] float32; not modified.
            row_slots: [num_rows] int64.
            host_slots: The same on the host.

        Returns:
            [num_rows, vocab_size] float32, `logits` itself if there is nothing to apply.
        """
        params = [self._slots.admitted[slot].sampling for slot in host_slots]
        has_allowed = [bool(p.allowed_token_ids) for p in params]
        if self._is_allowed is not None and any(has_allowed):
            is_free = ~upload(has_allowed, logits.device, torch.bool).unsqueeze(1)
            is_fit = self._is_allowed[row_slots] | is_free  # [num_rows, vocab_size]
            logits = torch.where(is_fit, logits, -torch.inf)
        if self._slots.host(host_slots, self._prefix).has_penalties.any():
            logits = self._penalise(logits, row_slots)
        changes = []
        for row, p in enumerate(params):
            biases = (*p.logit_bias, *((i, -torch.inf) for i in p.banned_token_ids))
            changes += [LogitChange(row, i, value) for i, value in biases]
            changes += min_tokens_changes(row, p.stop_token_ids, p.min_tokens)
        logits = apply_changes(logits, changes, self._slots, row_slots)
        return self.bad_words.forbid(logits, row_slots, host_slots)

    def _penalise(self, logits: Tensor, row_slots: Tensor) -> Tensor:
        """Repetition covers prompt and output (CTRL, arXiv 1909.05858), the others only output."""
        assert self._counts is not None
        assert self._is_in_prompt is not None
        settings = self._settings(row_slots)
        counts = self._counts[row_slots]  # [num_rows, vocab_size]
        is_seen = (counts > 0) | self._is_in_prompt[row_slots]
        factor = settings.repetition_penalty.unsqueeze(1)
        scaled = torch.where(logits > 0, logits / factor, logits * factor)
        changed = torch.where(is_seen, scaled, logits)
        changed = changed - counts * settings.frequency_penalty.unsqueeze(1)
        changed = changed - (counts > 0) * settings.presence_penalty.unsqueeze(1)
        return torch.where(settings.has_penalties.unsqueeze(1), changed, logits)

    def count(self, row_slots: Tensor, host_slots: tuple[int, ...], tokens: Tensor) -> None:
        """Count emitted tokens for the penalties.

        Args:
            row_slots: [num_rows] int64.
            host_slots: The same on the host.
            tokens: [num_rows] int64, -1 for rows that emitted none.
        """
        host = self._slots.host(host_slots, self._prefix)
        if self._counts is None or not host.has_penalties.any():
            return
        one = (tokens >= 0).to(torch.int32)
        self._counts.index_put_((row_slots, tokens.clamp_min(0)), one, accumulate=True)
