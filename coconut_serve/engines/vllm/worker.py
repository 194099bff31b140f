"""The state and work of a vLLM worker for rows that think: slots, fed vectors, decisions.

vLLM sees a thinking position as one more output token. Decision j of a request (counted from its
first output token) is made at position P - 1 + j, where P is the length of its prompt, and its
result is the input of position P + j. So vLLM's batch layout tells the host all it needs, in
decoding, chunked prefill and after preemption alike. Nothing here waits for the device.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coconut_serve.engines.vllm.params import Thinking
from coconut_serve.reasoning import report
from coconut_serve.reasoning.adapters import AdapterBank
from coconut_serve.reasoning.decide import Decider
from coconut_serve.reasoning.embedding import Embedding
from coconut_serve.reasoning.mode import needs_of
from coconut_serve.reasoning.plan import Needs, RowPlan, plan_row
from coconut_serve.reasoning.rows import StepRows
from coconut_serve.reasoning.sampling import TokenSampler
from coconut_serve.reasoning.settings import Admission, SlotSnapshot
from coconut_serve.reasoning.slots import Slots, index_of, upload
from coconut_serve.types import HaltReason


@dataclass(slots=True, eq=False)
class WorkerRow:
    """One request that thinks."""

    request_id: str
    thinking: Thinking
    num_prompt: int  # positions
    num_prefill: int  # positions to compute before the next decision: the prompt, and after a
    # preemption the outputs so far
    passes_through: bool  # whether vLLM's samples are used unchanged until the steps are spent
    fed: list[tuple[Tensor, int]] = field(default_factory=list)  # by decision: a log, the row in it
    needs: Needs = field(init=False)

    def __post_init__(self) -> None:
        self.needs = needs_of(self.thinking.params)

    @property
    def num_decisions(self) -> int:
        """Decisions that can be part of the thinking phase: its steps, its end, forced tokens."""
        params = self.thinking.params
        if params.enter_token_id is not None or params.mixture.in_answer:
            return 2**31  # the model opens blocks wherever it likes; no answer token is plain
        num_final = len(params.switch.final_token_ids)
        return params.steps + max(params.num_forced, num_final, 1 if params.steps else 0)

    def needs_step(self, decision: int) -> bool:
        """Whether a decision is more than sampling."""
        thinking = self.thinking
        is_counted = thinking.report_width > 0 or thinking.min_tokens > 0
        is_own = decision < self.num_decisions and not self.is_passed_on(decision)
        return is_own or is_counted

    def is_passed_on(self, decision: int) -> bool:
        """True while vLLM's own sample is used unchanged."""
        return self.passes_through and decision < self.thinking.params.steps

    def needs_no_sample(self, decision: int) -> bool:
        """Whether a decision is certain to need no sample: it thinks or feeds a forced token."""
        params = self.thinking.params
        may_answer = params.halt.may_halt or params.enter_token_id is not None
        if self.passes_through or may_answer or self.needs.sampled:
            return False
        return decision < params.steps + params.num_forced

    def plan(self, slot: int, decision: int) -> RowPlan:
        """Plan a decision; the host only knows how long thinking can last at most."""
        params, thinking = self.thinking.params, self.thinking
        is_open = params.enter_token_id is not None or decision <= params.steps
        return plan_row(
            params,
            self.needs,
            slot=slot,
            num_steps=decision,
            may_think=params.steps > 0 and is_open,
            may_answer=True,
            has_own_draw=bool(thinking.draw),
            is_sampled=True,  # vLLM samples each row
            is_read=thinking.wanted.has_scores and thinking.report_width > 0,
            wanted=thinking.wanted,
        )


@dataclass(frozen=True, slots=True)
class SavedRow:
    """What a preempted request needs to resume."""

    row: WorkerRow
    snapshot: SlotSnapshot
    num_output: Tensor | None  # [vocab_size], vLLM's counts for its penalties


@dataclass(frozen=True, slots=True)
class Decided:
    """Which rows of a batch were decided, and how."""

    members: list[int]  # rows of the batch, ascending
    slots: list[int]
    step: StepRows


class WorkerReasoning:
    """The reasoning of one worker. Slots are vLLM's own request indices.

    Args:
        num_slots: vLLM's max_num_seqs.
        hidden_size: Of the model's input embeddings and of what its output head takes.
        modes: Modes to support.
        embedding: The model's input embedding.
        adapters: What the checkpoint has between hidden states and inputs.
        vocab_size: Of the logits.
        dtype: Of the hidden states.
        device: Where the model runs.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        hidden_size: int,
        modes: Iterable[str],
        embedding: Embedding,
        adapters: AdapterBank,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.slots = Slots(num_slots, hidden_size, dtype=dtype, device=device)
        self.decider = Decider(self.slots, modes, embedding=embedding, adapters=adapters)
        self._thinking = TokenSampler(self.slots, "thinking")
        self._vocab_size = vocab_size
        self.rows: dict[int, WorkerRow] = {}  # slot -> row
        self._slot_of: dict[str, int] = {}
        self._saved: dict[str, SavedRow] = {}
        self._admitted: dict[int, Admission] = {}  # by slot, since the last step

    # ---- requests come and go ------------------------------------------------------------

    def add(
        self,
        slot: int,
        request_id: str,
        thinking: Thinking,
        *,
        num_prompt: int,
        prefill_token_ids: list[int],
        has_penalties: bool,
    ) -> Tensor | None:
        """Add a request, whose slot is set up before the next step; resume a preempted one.

        Args:
            slot: vLLM's request index.
            request_id: As vLLM names it.
            thinking: The request's settings.
            num_prompt: Positions.
            prefill_token_ids: Prompt, and outputs so far.
            has_penalties: Whether vLLM counts the tokens of the request.

        Returns:
            vLLM's penalty counts to restore, if any were saved.
        """
        thinking = thinking.within(self._vocab_size)
        saved = self._saved.pop(request_id, None)
        if saved is None:
            passes_through = (
                thinking.passes_through and not has_penalties
            )  # end tokens are not counted
            row = WorkerRow(
                request_id,
                thinking,
                num_prompt,
                len(prefill_token_ids),
                passes_through=passes_through,
            )
        else:
            row = saved.row
            row.num_prefill = len(prefill_token_ids)
        self.rows[slot] = row
        self._slot_of[request_id] = slot
        stops = thinking.answer_stop_token_ids
        self._admitted[slot] = Admission(
            slot=slot,
            next_token_id=prefill_token_ids[-1],
            seed=thinking.seed,
            reasoning=thinking.params,
            thinking=thinking.draws,
            hidden_token_id=thinking.hidden_token_id,
            failure_token_id=stops[0] if stops else -1,
            counts_steps=not row.passes_through,
            snapshot=saved.snapshot if saved else None,
        )
        return saved.num_output if saved else None

    def admit(self) -> None:
        """Set up the slots of all requests that came since the last step: one upload."""
        if self._admitted:
            self.slots.admit(list(self._admitted.values()))
            self._admitted.clear()

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop requests that ended; `remove` treats all others as preempted."""
        for request_id in request_ids:
            self._saved.pop(request_id, None)
            slot = self._slot_of.pop(request_id, None)
            if slot is not None:
                del self.rows[slot]
                self._admitted.pop(slot, None)

    def remove(self, request_id: str, num_output: Tensor | None) -> None:
        """Save what a preempted request needs to resume; do nothing if it ended.

        Args:
            request_id: As vLLM names it.
            num_output: [max_num_seqs, vocab_size], vLLM's penalty counts, if the request uses any.
        """
        slot = self._slot_of.pop(request_id, None)
        if slot is None:
            return
        self.admit()
        row = self.rows.pop(slot)
        counts = num_output[slot].clone() if num_output is not None else None
        self._saved[request_id] = SavedRow(row, self.slots.save(slot), counts)

    @property
    def num_saved(self) -> int:
        """Preempted requests whose state is kept."""
        return len(self._saved)

    def slot_of(self, request_id: str) -> int | None:
        """The slot of a thinking request that runs."""
        return self._slot_of.get(request_id)

    # ---- inputs --------------------------------------------------------------------------

    def overlay(self, embeds: Tensor, batch: Any) -> None:
        """Overwrite the embeddings of placeholder tokens with the fed vectors.

        Args:
            embeds: [num_tokens, hidden_size], written in place.
            batch: vLLM's InputBatch.
        """
        self.admit()
        if not self.rows:
            return
        slots, at = [], []
        starts, computed = batch.query_start_loc_np, batch.num_computed_tokens_np
        for i, slot in enumerate(batch.idx_mapping_np.tolist()):
            row = self.rows.get(slot)
            if row is None or not row.thinking.num_fed:
                continue
            first = int(computed[i]) - row.num_prompt  # decision that feeds the first position
            if int(computed[i]) < row.num_prefill:
                self._replay_vectors(row, embeds[int(starts[i]) : int(starts[i + 1])], first)
            elif 0 <= first < row.thinking.num_fed:
                slots.append(slot)
                at.append(int(starts[i]))
        if not slots:
            return
        rows = upload(slots, embeds.device)
        index = upload(at, embeds.device)
        is_vector = self.slots.is_vector[rows].unsqueeze(1)
        vector = self.slots.vector[rows].to(embeds.dtype)
        embeds[index] = torch.where(is_vector, vector, embeds[index])

    def _replay_vectors(self, row: WorkerRow, embeds: Tensor, first: int) -> None:
        """Replay the vectors of a chunk; decision `first` feeds its first position."""
        low, high = max(0, first), min(first + embeds.shape[0], len(row.fed))
        if low >= high:
            return
        part = self._gather(row.fed[low:high])
        target = embeds[low - first : high - first]
        vector, is_vector = part[:, :-1].to(target.dtype), part[:, -1:] > 0
        target.copy_(torch.where(is_vector, vector, target))

    def _gather(self, fed: list[tuple[Tensor, int]]) -> Tensor:
        """Copy logged vectors back to the device, in order; [len(fed), hidden_size + 1]."""
        size, device = self.slots.hidden_size + 1, self.slots.device
        whole = torch.empty(len(fed), size, dtype=self.slots.vector.dtype, device=device)
        for target, (log, index) in zip(whole, fed, strict=True):
            target.copy_(log[index], non_blocking=True)
        return whole

    def _log(self, decided: Decided, decisions: list[int]) -> None:
        """Log what was fed on the host: device memory is planned to the last byte.

        Copies to and from the host are queued on one stream, so they need no synchronisation.
        """
        kept = [
            k
            for k, (slot, j) in enumerate(zip(decided.slots, decisions, strict=True))
            if j < self.rows[slot].thinking.num_fed
        ]
        if not kept:
            return
        step = decided.step
        is_vector = step.is_vector.unsqueeze(1).to(step.vector.dtype)
        log = torch.cat([step.select(step.vector, kept), step.select(is_vector, kept)], dim=1)
        if log.device.type != "cpu":
            log = torch.empty(log.shape, dtype=log.dtype, pin_memory=True).copy_(
                log, non_blocking=True
            )
        for index, k in enumerate(kept):
            self.rows[decided.slots[k]].fed.append((log, index))

    # ---- decisions -----------------------------------------------------------------------

    def _decisions(
        self, slots: np.ndarray, num_positions: np.ndarray
    ) -> Iterator[tuple[int, int, WorkerRow, int]]:
        """The rows of a batch that think and whose last known position was computed."""
        for i, slot in enumerate(slots.tolist() if self.rows else ()):
            row = self.rows.get(slot)
            if row is not None and int(num_positions[i]) >= row.num_prefill:
                yield i, slot, row, int(num_positions[i]) - row.num_prompt

    def deciding(
        self, slots: np.ndarray, num_positions: np.ndarray
    ) -> list[tuple[int, int, WorkerRow, int]]:
        """Find the rows of a batch that need the reasoning step now.

        Args:
            slots: [num_rows].
            num_positions: [num_rows], positions known after this step's forward pass.

        Returns:
            (row of the batch, slot, its record, number of its decision) for each.
        """
        whole = self._decisions(slots, num_positions)
        return [each for each in whole if each[2].needs_step(each[3])]

    def skippable_rows(
        self, slots: np.ndarray, num_positions: np.ndarray
    ) -> tuple[list[int], list[int]]:
        """Find rows of a batch whose sample or logits can be skipped.

        Args:
            slots: [num_rows].
            num_positions: [num_rows], as `deciding` takes them.

        Returns:
            Rows that need no sample, and those of them that need no logits either.
        """
        found = self._decisions(slots, num_positions)
        settled = [(i, row.plan(slot, j)) for i, slot, row, j in found if row.needs_no_sample(j)]
        return [i for i, _ in settled], [i for i, plan in settled if not plan.needs_logits]

    def track_end_tokens(
        self, slots: np.ndarray, num_positions: np.ndarray, sampled: Tensor
    ) -> None:
        """End the thinking of rows whose unchanged sample is their end token.

        Args:
            slots: [num_rows].
            num_positions: [num_rows], as `deciding` takes them.
            sampled: [num_rows] int64, vLLM's samples.
        """
        passed = [
            (i, slot)
            for i, slot, row, decision in self._decisions(slots, num_positions)
            if row.thinking.params.halt.stop_token_ids and row.is_passed_on(decision)
        ]
        if not passed:
            return
        members, index = (upload(part, sampled.device) for part in zip(*passed, strict=True))
        state = self.slots
        is_end = state.is_thinking[index] & (sampled[members] == state.forced[index, 0])
        state.is_thinking[index] &= ~is_end
        state.forced_left[index] -= is_end.to(torch.int64)

    def decide(
        self,
        found: list[tuple[int, int, WorkerRow, int]],
        *,
        hidden: Tensor,
        logits: Tensor,
        adjusted: Tensor,
        sampled: Tensor,
    ) -> Decided:
        """Decide the found rows and write the tokens that vLLM sees for them.

        Args:
            found: What `deciding` found.
            hidden: [num_batch_rows, hidden_size], after the final norm.
            logits: [num_batch_rows, vocab_size], raw.
            adjusted: The same with penalties and biases.
            sampled: [num_batch_rows] int64, vLLM's samples; overwritten.
        """
        members = [i for i, _, _, _ in found]
        plans = [row.plan(slot, decision) for _, slot, row, decision in found]
        index = upload(members, hidden.device)
        step = StepRows(plans, hidden[index], self.slots)
        scored = [k for k, plan in enumerate(plans) if plan.needs_logits]
        if scored:
            rows = [members[k] for k in scored]
            raw = _take(logits, rows)
            step.set_logits(scored, raw, raw if adjusted is logits else _take(adjusted, rows))
        step.sampled = step.answer = sampled[index]
        step.draw_apart(self._thinking)
        self.decider.decide(step)
        decided = Decided(members, [slot for _, slot, _, _ in found], step)
        self._log(decided, [decision for _, _, _, decision in found])
        settings = self.slots.settings(step.row_slots)
        token = torch.where(step.token < 0, settings.hidden_token_id, step.token)
        failure = settings.failure_token_id
        has_failed = (step.halt == int(HaltReason.NUMERICAL)) & (failure >= 0)
        sampled[index] = torch.where(has_failed, failure, token).to(sampled.dtype)
        return decided

    def wants_inputs(self, slots: np.ndarray) -> bool:
        """Whether a row of a batch has a trace, which compares with the previous input."""
        rows = map(self.rows.get, slots.tolist()) if self.rows else ()
        return any(row is not None and row.thinking.wanted.has_scores for row in rows)

    def pack(self, decided: Decided, inputs: Tensor | None, num_rows: int) -> Tensor | None:
        """Make the report of a batch; None if no row has one.

        Args:
            decided: What `decide` returned.
            inputs: [num_rows, hidden_size], the last input of each row; None if no row needs it.
            num_rows: Of the batch.

        Returns:
            [num_rows, width] float32; zeros for rows that were not decided.
        """
        widths = [self.rows[slot].thinking.report_width for slot in decided.slots]
        if not any(widths):
            return None
        step = decided.step
        index = upload(decided.members, step.hidden.device)
        packed = report.pack(step, step.hidden if inputs is None else inputs[index])
        whole = packed.new_zeros(num_rows, max(packed.shape[1], *widths))
        whole[index, : packed.shape[1]] = packed
        return whole


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    """Rows of the logits in float32."""
    return logits[index_of(rows, logits.device)].float()
