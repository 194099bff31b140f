"""The whole reasoning step of an engine without a sampler of its own: sample, decide, report.

The native engine calls it after each forward pass with the hidden states of the rows whose last
known position was just computed. It works on device tensors; the host gets one packed copy.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from coconut_serve.params import Phase, ReasoningParams
from coconut_serve.reasoning import report
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.decide import Decider
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.mode import ProjectLogits, load_mode
from coconut_serve.reasoning.rows import RowPlan, RowResult, StepRows, Wanted
from coconut_serve.reasoning.sampling import Drawer, Sampler
from coconut_serve.reasoning.settings import Admission
from coconut_serve.reasoning.slots import Slots
from coconut_serve.types import HaltReason, Request


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a sequence has thought and answered, as the host has seen it."""

    params: ReasoningParams
    is_thinking: bool
    num_steps_left: int
    num_forced_left: int
    num_blocks_left: int  # that the model may still open
    num_steps: int = 0
    num_output_tokens: int = 0
    is_cut_short: bool = False  # the switches were spent

    @classmethod
    def start(cls, params: ReasoningParams) -> "Progress":
        """Build the state before the first decision."""
        opens_at_once = params.enter_token_id is None
        return cls(
            params=params,
            is_thinking=params.steps > 0 and opens_at_once,
            num_steps_left=params.steps,
            num_forced_left=params.num_forced if opens_at_once else 0,
            num_blocks_left=0 if opens_at_once else params.max_blocks,
        )

    def note(self, result: RowResult) -> None:
        """Follow one decision."""
        self.is_thinking = self.is_thinking and result.phase is Phase.THINK
        self.num_steps_left -= result.phase is Phase.THINK
        self.num_steps += result.phase is Phase.THINK
        if result.halt_reason is HaltReason.SWITCHES:
            self.is_cut_short = True
            self.num_forced_left = len(self.params.switch.final_token_ids) or self.num_forced_left
        self.num_forced_left -= result.phase is Phase.BOUNDARY
        self.num_output_tokens += result.phase is Phase.ANSWER
        if self.num_blocks_left and result.phase is Phase.ANSWER:
            self._open_block(result.token_id)

    def has_answered(self, max_tokens: int) -> bool:
        """Whether the answer is as long as it may be."""
        bound = self.params.switch.answer_tokens if self.is_cut_short else 0
        return self.num_output_tokens >= min(max_tokens, bound or max_tokens)

    def _open_block(self, token_id: int | None) -> None:
        """Think anew if the model said so."""
        if token_id == self.params.enter_token_id:
            self.is_thinking = True
            self.num_blocks_left -= 1
            self.num_steps_left = self.params.steps
            self.num_forced_left = self.params.num_forced


def plan_row(request: Request, slot: int, progress: Progress) -> RowPlan:
    """Plan one row: what the step must compute for its next decision."""
    params = request.reasoning
    mode = load_mode(params.mode)
    may_think = progress.is_thinking
    may_halt = params.halt.may_halt
    may_leave = not may_think or progress.num_steps_left <= 0 or may_halt
    may_answer = may_leave and progress.num_forced_left == 0
    draws_thoughts = may_think and mode.needs_sampled(params)
    needs_sampled = may_answer or draws_thoughts
    asks_mode = may_think or (params.mixture.in_answer and may_answer)
    thinks_on_logits = asks_mode and mode.thinks_on_logits(params)
    wanted = Wanted.read(request)
    if not may_think:
        wanted = Wanted(num_logprobs=wanted.num_logprobs)
    has_trace = wanted.trace_top_k is not None
    return RowPlan(
        slot=slot,
        mode=params.mode,
        num_steps=progress.num_steps,
        may_think=may_think,
        asks_mode=asks_mode,
        needs_logits=needs_sampled or has_trace or thinks_on_logits,
        needs_sampled=needs_sampled,
        thinks_on_logits=thinks_on_logits,
        draws_apart=draws_thoughts and request.thinking is not None,
        wanted=wanted,
    )


class ReasoningStep:
    """One whole step of an engine without a sampler of its own: sample, decide, report.

    Args:
        slots: The engine's slots.
        mode_names: Modes the model supports.
        vocab_size: Columns of the logits.
        embedding: The model's input embedding.
        adapters: What stands between hidden states and inputs.
        project_logits: The output head with its scaling and soft-caps.
    """

    def __init__(
        self,
        slots: Slots,
        mode_names: Iterable[str],
        *,
        vocab_size: int,
        embedding: Embedding,
        adapters: AdapterBank,
        project_logits: ProjectLogits,
    ) -> None:
        self._slots = slots
        self._decider = Decider(slots, mode_names, embedding=embedding, adapters=adapters)
        self._sampler = Sampler(slots, vocab_size)
        self._thinking = Drawer(slots, "thinking")
        self._project_logits = project_logits

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Set slots up, all that a step admits at once: one upload."""
        if admissions:
            self._sampler.admit(admissions)

    def run(self, rows: list[RowPlan], hidden: Tensor, inputs: Tensor) -> list[RowResult]:
        """Decide the next input of each row, write it to the row's slot, report to the host.

        Args:
            rows: One plan a row.
            hidden: [num_rows, hidden_size], after the final norm.
            inputs: [num_rows, hidden_size], what was fed at these positions (for traces).

        Returns:
            One result a row.
        """
        step = StepRows(rows, hidden, self._slots)
        self._sample(step)
        self._decider.decide(step)
        self._sampler.count(step.row_slots, step.host_slots, step.emitted)
        self._sampler.bad_words.note(step.row_slots, step.host_slots, step.token)
        host: list[list[float]] = report.pack(step, inputs).tolist()  # the step's one copy
        return [report.read(row.wanted, v) for row, v in zip(rows, host, strict=True)]

    def _sample(self, step: StepRows) -> None:
        """Compute logits for the rows that need them and draw a token for each of those."""
        wanted = [i for i, row in enumerate(step.rows) if row.needs_logits]
        if not wanted:
            return
        raw = self._project_logits(step.select(step.hidden, wanted)).float()
        row_slots = step.select(step.row_slots, wanted)
        host_slots = tuple(step.rows[i].slot for i in wanted)
        step.set_logits(wanted, raw, self._sampler.adjust(raw, row_slots, host_slots))
        draws = [k for k, i in enumerate(wanted) if step.rows[i].needs_sampled]
        if not draws:
            return
        members = [wanted[k] for k in draws]
        logits = step.logits_of(members)
        drawn, is_bad = self._sampler.sample(
            logits, step.select(row_slots, draws), tuple(host_slots[k] for k in draws)
        )
        step.assign(step.sampled, members, drawn)
        step.assign(step.is_bad_sample, members, is_bad)
        step.draw_apart(self._thinking)
