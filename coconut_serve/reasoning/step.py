"""The batched reasoning step: sample, let each mode decide, write the slots.

Both real engines call it after each forward pass with the hidden states of the rows whose last
known position was just computed. It works on device tensors; the host gets one packed copy.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from coconut_serve.reasoning import mixing
from coconut_serve.reasoning.mode import ProjectLogits, ReasoningMode, StepContext
from coconut_serve.reasoning.registry import load_mode
from coconut_serve.reasoning.sampling import Sampler, top_logprobs
from coconut_serve.reasoning.slots import EmbedTokens, Slots, SlotSnapshot
from coconut_serve.types import (
    HaltReason,
    Phase,
    ReasoningParams,
    ReasoningTrace,
    Request,
    TokenLogprobs,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowPlan:
    """What the host knows of one row before the step; it never waits for a tensor to know it.

    Every flag may be True without need: that costs time, not exactness.
    """

    slot: int
    mode: str
    may_think: bool  # False once the host has seen the phase end
    needs_logits: bool
    needs_sampled: bool  # a token is drawn from the logits
    num_output_tokens: int = 0
    num_logprobs: int | None = None
    trace_top_k: int | None = None  # None: no trace; 0: no logit lens
    wants_vector: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """What the step decided for one row, on the host."""

    phase: Phase
    token_id: int | None  # None: a step without text
    is_vector: bool
    halt_reason: HaltReason  # set on the decision that ended the thinking phase
    logprobs: TokenLogprobs | None
    trace: ReasoningTrace | None


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a sequence has thought and answered, as the host has seen it."""

    is_thinking: bool
    num_steps_left: int
    num_forced_left: int
    num_output_tokens: int = 0

    @classmethod
    def start(cls, params: ReasoningParams) -> "Progress":
        """Build the state before the first decision."""
        num_forced = len(params.end_token_ids)
        return cls(
            is_thinking=params.steps > 0, num_steps_left=params.steps, num_forced_left=num_forced
        )

    def note(self, result: RowResult) -> None:
        """Follow one decision."""
        self.is_thinking = self.is_thinking and result.phase is Phase.THINK
        self.num_steps_left -= result.phase is Phase.THINK
        self.num_forced_left -= result.phase is Phase.BOUNDARY
        self.num_output_tokens += result.phase is Phase.ANSWER


def plan_row(request: Request, slot: int, progress: Progress) -> RowPlan:
    """Plan one row: what the step must compute for its next decision."""
    params, sampling = request.reasoning, request.sampling
    mode = load_mode(params.mode)
    may_think = progress.is_thinking
    may_halt = params.halt.entropy_below > 0 or params.stop_token_id is not None
    may_leave = not may_think or progress.num_steps_left <= 0 or may_halt
    may_answer = may_leave and progress.num_forced_left == 0
    needs_sampled = may_answer or (may_think and mode.needs_sampled)
    has_trace = may_think and params.trace != "none"
    return RowPlan(
        slot=slot,
        mode=params.mode,
        may_think=may_think,
        needs_logits=needs_sampled or has_trace or (may_think and mode.needs_logits),
        needs_sampled=needs_sampled,
        num_output_tokens=progress.num_output_tokens,
        num_logprobs=sampling.num_logprobs,
        trace_top_k=(params.trace_top_k if params.has_topk_trace else 0) if has_trace else None,
        wants_vector=params.trace == "vectors",
    )


class ReasoningStep:
    """Decides the next input of every row of a batch, whatever their modes.

    Args:
        slots: The engine's slots.
        mode_names: Modes the model supports.
        vocab_size: Columns of the logits.
        embed_tokens: The model's own embedding call.
        project_logits: The output head with its scaling and soft-caps.
    """

    def __init__(
        self,
        slots: Slots,
        mode_names: Iterable[str],
        *,
        vocab_size: int,
        embed_tokens: EmbedTokens,
        project_logits: ProjectLogits,
    ) -> None:
        self._slots = slots
        self._modes: dict[str, ReasoningMode] = {n: load_mode(n)(slots) for n in mode_names}
        self._sampler = Sampler(slots, vocab_size)
        self._embed_tokens = embed_tokens
        self._project_logits = project_logits

    def admit(self, slot: int, request: Request, snapshot: SlotSnapshot | None = None) -> None:
        """Set a slot up for a request; with a snapshot, go on where it was taken."""
        sampling, params = request.sampling, request.reasoning
        self._slots.admit(slot, params, sampling.seed, request.prompt_token_ids[-1])
        self._sampler.admit(slot, sampling, request.prompt_token_ids)
        self._modes[params.mode].admit(slot, params)
        if snapshot is not None:
            self._slots.restore(slot, snapshot)

    def run(self, rows: list[RowPlan], hidden: Tensor, inputs: Tensor) -> list[RowResult]:
        """Decide the next input of each row, write it to the row's slot, report to the host.

        Args:
            rows: One plan a row.
            hidden: [num_rows, hidden_size], after the final norm.
            inputs: [num_rows, hidden_size], what was fed at these positions (for traces).

        Returns:
            One result a row.
        """
        step = _Step(rows, hidden, self._slots)
        self._sample(step)
        self._decide(step)
        self._write(step)
        return _report(step, inputs)

    def _sample(self, step: "_Step") -> None:
        """Compute logits for the rows that need them and draw a token for each of those."""
        wanted = [i for i, row in enumerate(step.rows) if row.needs_logits]
        if not wanted:
            return
        step.set_logits(wanted, self._project_logits(step.select(step.hidden, wanted)).float())
        assert step.raw_logits is not None
        row_slots = step.select(step.row_slots, wanted)
        host_slots = tuple(step.rows[i].slot for i in wanted)
        num_output_tokens = tuple(step.rows[i].num_output_tokens for i in wanted)
        step.logits = self._sampler.adjust(
            step.raw_logits, row_slots, host_slots, num_output_tokens
        )
        draws = [k for k, i in enumerate(wanted) if step.rows[i].needs_sampled]
        if not draws:
            return
        logits = step.select(step.logits, draws)
        drawn = self._sampler.sample(
            logits, step.select(row_slots, draws), tuple(host_slots[k] for k in draws)
        )
        members = [wanted[k] for k in draws]
        step.assign(step.sampled, members, drawn)
        # With NaN among the logits the drawn token's own is NaN, or none was fit to draw.
        is_bad = ~logits.gather(1, drawn.unsqueeze(1)).squeeze(1).isfinite()
        step.assign(step.is_bad_sample, members, is_bad)

    def _decide(self, step: "_Step") -> None:
        """Let each mode decide for its rows; the step itself counts steps and forces tokens."""
        slots, rows = self._slots, step.row_slots
        is_thinking = slots.is_thinking[rows]
        has_steps = slots.steps_left[rows] > 0
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(step.rows):
            if row.may_think:
                groups.setdefault(row.mode, []).append(i)
        for name, members in groups.items():
            self._decide_group(step, self._modes[name], members)
        step.halt = torch.where(is_thinking & ~has_steps, int(HaltReason.CAP), step.halt)
        step.halt = torch.where(is_thinking, step.halt, 0)
        step.thinks = is_thinking & (step.halt == 0)
        has_forced = slots.forced_left[rows] > 0
        step.is_forced = ~step.thinks & has_forced
        step.is_vector &= step.thinks
        token = torch.where(step.thinks, step.text, step.sampled)
        step.token = torch.where(step.is_forced, slots.forced[rows, 0], token)

    def _decide_group(self, step: "_Step", mode: ReasoningMode, members: list[int]) -> None:
        """Ask one mode about its rows and scatter the answer."""
        ctx = StepContext(
            slots=self._slots,
            row_slots=step.select(step.row_slots, members),
            host_slots=tuple(step.rows[i].slot for i in members),
            hidden=step.select(step.hidden, members),
            logits=step.logits_of(members) if mode.needs_logits else None,
            sampled=step.select(step.sampled, members) if mode.needs_sampled else None,
            embed_tokens=self._embed_tokens,
        )
        decision = mode.decide(ctx)
        step.assign(step.text, members, decision.token)
        if decision.halt is not None:
            step.assign(step.halt, members, decision.halt)
        if decision.retained_mass is not None:
            step.assign(step.retained_mass, members, decision.retained_mass)
        if decision.vector is None:
            return
        vector = decision.vector.to(step.vector.dtype)
        flags = decision.is_vector
        if flags is None:
            flags = torch.ones(len(members), dtype=torch.bool, device=vector.device)
        # NaN or Inf must end this row alone: it is zeroed here, so nothing spreads.
        is_finite = vector.isfinite().all(-1)
        step.assign(step.is_bad_vector, members, flags & ~is_finite)
        step.assign(step.vector, members, torch.where(is_finite.unsqueeze(1), vector, 0.0))
        step.assign(step.is_vector, members, flags)

    def _write(self, step: "_Step") -> None:
        """Write the next input and the counters of every row."""
        slots, rows = self._slots, step.row_slots
        is_bad = torch.where(step.is_vector, step.is_bad_vector, step.is_bad_sample)
        step.halt = torch.where(is_bad & ~step.is_forced, int(HaltReason.NUMERICAL), step.halt)
        slots.token[rows] = step.token.clamp_min(0)
        slots.is_vector[rows] = step.is_vector
        slots.vector[rows] = step.vector
        slots.is_thinking[rows] = step.thinks
        slots.steps_left[rows] -= step.thinks.to(torch.int64)
        slots.num_decisions[rows] += 1
        rolled = slots.forced[rows].roll(-1, dims=1)
        slots.forced[rows] = torch.where(step.is_forced.unsqueeze(1), rolled, slots.forced[rows])
        slots.forced_left[rows] -= step.is_forced.to(torch.int64)
        emitted = torch.where(step.is_forced, -1, step.token)
        self._sampler.count(rows, tuple(row.slot for row in step.rows), emitted)


class _Step:
    """Tensors of one step while it is being decided; all [num_rows, ...]."""

    def __init__(self, rows: list[RowPlan], hidden: Tensor, slots: Slots) -> None:
        num_rows, device = len(rows), hidden.device
        self.rows = rows
        self.hidden = hidden
        self.row_slots = torch.tensor([row.slot for row in rows], device=device)
        self.raw_logits: Tensor | None = None  # [num_logit_rows, vocab_size]
        self.logits: Tensor | None = None  # the same, adjusted
        self._logit_row: dict[int, int] = {}  # row -> its row in the logits
        self.sampled = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
        self.text = self.sampled.clone()  # the token a thinking step stands for
        self.token = self.sampled  # decided: next input, or the text of a vector
        self.halt = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.thinks = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.is_forced = self.thinks.clone()
        self.is_vector = self.thinks.clone()
        self.is_bad_vector = self.thinks.clone()  # NaN or Inf in what would be fed
        self.is_bad_sample = self.thinks.clone()  # the same in the logits drawn from
        self.vector = torch.zeros(
            num_rows, slots.hidden_size, dtype=slots.vector.dtype, device=device
        )
        self.retained_mass = torch.ones(num_rows, device=device)

    def _is_all(self, members: list[int], num_rows: int) -> bool:
        return len(members) == num_rows

    def select(self, tensor: Tensor, members: list[int]) -> Tensor:
        """Take rows; `members` is sorted, so taking all of them copies nothing."""
        if self._is_all(members, tensor.shape[0]):
            return tensor
        return tensor[torch.tensor(members, device=tensor.device)]

    def assign(self, tensor: Tensor, members: list[int], values: Tensor) -> None:
        """Write rows in place."""
        if self._is_all(members, tensor.shape[0]):
            tensor.copy_(values)
        else:
            tensor[torch.tensor(members, device=tensor.device)] = values

    def spread(self, values: Tensor, members: list[int]) -> Tensor:
        """Give every row of the step its columns; zeros where a row is no member."""
        if self._is_all(members, len(self.rows)):
            return values
        whole = values.new_zeros(len(self.rows), values.shape[1])
        self.assign(whole, members, values)
        return whole

    def set_logits(self, members: list[int], logits: Tensor) -> None:
        """Keep the raw logits of `members`, in that order."""
        self.raw_logits = logits
        self._logit_row = {row: k for k, row in enumerate(members)}

    def logits_of(self, members: list[int], *, is_raw: bool = False) -> Tensor:
        """Logits of rows that have them; [len(members), vocab_size]."""
        logits = self.raw_logits if is_raw else self.logits
        assert logits is not None
        return self.select(logits, [self._logit_row[i] for i in members])


def _report(step: _Step, inputs: Tensor) -> list[RowResult]:
    """Put all the host needs into one float64 matrix, copy it once, read its rows.

    float64 holds ids and float32 values alike without loss.
    """
    rows = step.rows
    flags = [step.token, step.thinks, step.is_forced, step.is_vector, step.halt]
    parts = [torch.stack([flag.double() for flag in flags], dim=1)]  # [num_rows, 5]
    scored = [i for i, r in enumerate(rows) if r.num_logprobs is not None and r.needs_logits]
    num_scored = max((rows[i].num_logprobs or 0 for i in scored), default=0)
    if scored:
        logits = step.logits_of(scored, is_raw=True)
        tokens = step.select(step.token, scored)
        ids, values = top_logprobs(logits, tokens, num_scored)
        parts.append(step.spread(torch.cat([ids, values.double()], 1), scored))
    traced = [i for i, r in enumerate(rows) if r.trace_top_k is not None]
    num_shown = max(1, *(rows[i].trace_top_k or 0 for i in traced)) if traced else 0
    if traced:
        parts.append(step.spread(_trace_columns(step, traced, inputs, num_shown), traced))
        if any(row.wants_vector for row in rows):
            parts.append(step.vector.double())
    host: list[list[float]] = torch.cat(parts, dim=1).tolist()  # the step's one copy
    scores_at, traces_at = 5, 5 + (2 * (1 + num_scored) if scored else 0)
    return [
        _result(
            row,
            _read_logprobs(row, values[scores_at:], num_scored) if i in scored else None,
            _read_trace(row, values[traces_at:], num_shown) if i in traced else None,
            [int(value) for value in values[:5]],
        )
        for i, (row, values) in enumerate(zip(rows, host, strict=True))
    ]


def _trace_columns(step: _Step, traced: list[int], inputs: Tensor, num_shown: int) -> Tensor:
    """Five scalars, then ids and probabilities of the likeliest tokens; float64."""
    log_probs = step.logits_of(traced, is_raw=True).log_softmax(-1)
    top, top_ids = log_probs.topk(num_shown, dim=-1)
    fed = step.select(step.vector, traced).float()
    scalars = [
        mixing.entropy(log_probs),
        top[:, 0].exp(),
        fed.norm(dim=-1),
        torch.cosine_similarity(fed, step.select(inputs, traced).float(), dim=-1),
        step.select(step.retained_mass, traced),
    ]
    return torch.cat([torch.stack(scalars, 1).double(), top_ids, top.exp().double()], dim=1)


def _read_logprobs(row: RowPlan, values: list[float], num_top: int) -> TokenLogprobs:
    ids, scores = values[1 : 1 + num_top], values[num_top + 1 : 2 * (num_top + 1)]
    top = zip(map(int, ids), scores[1:], strict=True)
    return TokenLogprobs(logprob=scores[0], top=tuple(top)[: row.num_logprobs])


def _read_trace(row: RowPlan, values: list[float], num_shown: int) -> ReasoningTrace:
    entropy, max_prob, norm, cosine, retained_mass, *rest = values
    top = tuple(zip(map(int, rest[:num_shown]), rest[num_shown : 2 * num_shown], strict=True))
    return ReasoningTrace(
        entropy=entropy,
        max_prob=max_prob,
        norm=norm,
        cosine=cosine,
        retained_mass=retained_mass,
        top=top[: row.trace_top_k],
        vector=tuple(rest[2 * num_shown :]) if row.wants_vector else None,
    )


def _result(
    row: RowPlan, logprobs: TokenLogprobs | None, trace: ReasoningTrace | None, flags: list[int]
) -> RowResult:
    token, thinks, is_forced, is_vector, halt = flags
    phase = Phase.THINK if thinks else Phase.BOUNDARY if is_forced else Phase.ANSWER
    has_token = token >= 0
    return RowResult(
        phase=phase,
        token_id=token if has_token else None,
        is_vector=bool(is_vector),
        halt_reason=HaltReason(halt),
        logprobs=logprobs if phase is Phase.ANSWER and has_token else None,
        trace=trace if phase is Phase.THINK else None,
    )
