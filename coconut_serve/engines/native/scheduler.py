"""Which sequences advance in a step, by how many positions, in which blocks.

There are no phases here: each sequence has known and computed positions, and a step closes some of
the gap. The scheduler never looks at a tensor.
"""

import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

from coconut_serve.engines.native.block_pool import BlockPool
from coconut_serve.engines.native.sequence import Sequence, SequenceStatus
from coconut_serve.reasoning.progress import RowResult
from coconut_serve.types import RequestOutput, WaitReason


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """Positions [start, end) of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    end: int

    @property
    def is_deciding(self) -> bool:
        """Whether the pending position is among them, so that a decision follows."""
        return self.end == self.sequence.num_known

    @property
    def is_decode(self) -> bool:
        """Whether the pending position is all of it."""
        return self.is_deciding and self.end - self.start == 1


@dataclass(frozen=True, slots=True)
class Preemption:
    """A sequence that lost its slot and blocks; the runner saves it before anything is reused."""

    sequence: Sequence
    slot: int
    blocks: tuple[int, ...]
    num_computed: int


@dataclass(slots=True)
class Schedule:
    """One step. The runner does the parts in this order: save, copy, admit, forward."""

    preemptions: list[Preemption] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)  # (from, to)
    admissions: list[Sequence] = field(default_factory=list)
    rows: list[ScheduledRow] = field(default_factory=list)  # decode rows first


def _place(row: ScheduledRow) -> tuple[Any, ...]:
    """Sort key of a row in its step: decode rows first, then by class."""
    return not row.is_decode, *row.sequence.progress.step_class


class Scheduler:
    """Continuous batching with chunked prefill, prefix cache, forks and preemption.

    Running sequences come before waiting ones and decode rows before chunks; when blocks run out
    the newest sequence is preempted. A sequence alone always fits: the engine's max_model_len is
    at most what the pool holds.

    Args:
        pool: The KV blocks.
        max_num_seqs: Slots.
        max_num_batched_tokens: Positions a step computes at most.
        max_model_len: Positions a sequence may have.
        long_after: Longer sequences use LongRoPE's long factors; None: there are none.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        long_after: int | None = None,
    ) -> None:
        self.pool = pool
        self._budget = max(max_num_batched_tokens, max_num_seqs)
        self._max_model_len = max_model_len
        self._long_after = long_after
        self._free_slots = deque(range(max_num_seqs))
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self._by_id: dict[str, Sequence] = {}
        self.num_preemptions = 0
        self.wait_reason: WaitReason = "capacity"  # why the last step left sequences waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; its id must be unique among live ones."""
        assert sequence.request.request_id not in self._by_id, "a request id is live twice"
        self._by_id[sequence.request.request_id] = sequence
        sequence.is_long = self._is_long(sequence)
        self.waiting.append(sequence)

    def _is_long(self, sequence: Sequence) -> bool:
        return self._long_after is not None and sequence.num_ids > self._long_after

    def abort(self, request_id: str) -> bool:
        """Drop a waiting or running sequence; False if it has already ended."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        if sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        self._retire(sequence)
        return True

    def has_work(self) -> bool:
        """Whether some sequence has not ended."""
        return bool(self._by_id)

    def schedule(self) -> Schedule:
        """Plan the next step."""
        plan = Schedule()
        self._lengthen(plan)
        num_longer = len(plan.preemptions)
        rows: dict[Sequence, ScheduledRow] = {}
        budget = self._budget
        decoding = [s for s in self.running if s.is_decoding]
        prefilling = [s for s in self.running if not s.is_decoding]
        for sequence in decoding + prefilling:
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # an older one has just preempted it
            end = sequence.num_computed + min(sequence.num_to_compute, budget)
            if end > sequence.num_computed and self._grow(sequence, end, plan, rows):
                rows[sequence] = ScheduledRow(sequence, sequence.num_computed, end)
                budget = self._budget - sum(row.end - row.start for row in rows.values())
        if plan.preemptions:  # a step that preempts admits nothing
            self.wait_reason = "kv" if len(plan.preemptions) > num_longer else "capacity"
        else:
            self.wait_reason = self._admit_waiting(plan, rows, budget)
        plan.rows = sorted(rows.values(), key=_place)
        return plan

    def _lengthen(self, plan: Schedule) -> None:
        """Recompute sequences that have become long: their keys have the short factors."""
        for sequence in reversed(self.running[:]):
            if not sequence.is_long and self._is_long(sequence):
                self._preempt(sequence, plan)
                self.num_preemptions -= 1  # not for lack of blocks
                sequence.is_long = True

    def _grow(
        self, sequence: Sequence, end: int, plan: Schedule, rows: dict[Sequence, ScheduledRow]
    ) -> bool:
        """Allocate blocks up to `end`, preempting newer sequences; False if preempted itself."""
        while True:
            blocks = self.pool.allocate(self._num_missing_blocks(sequence, end))
            if blocks is not None:
                sequence.blocks += blocks
                return True
            victim = self.running[-1]
            rows.pop(victim, None)
            self._preempt(victim, plan)
            if victim is sequence:
                return False

    def _num_missing_blocks(self, sequence: Sequence, end: int) -> int:
        return max(0, -(-end // self.pool.block_size) - len(sequence.blocks))

    def _preempt(self, sequence: Sequence, plan: Schedule) -> None:
        """Take slot and blocks away; all inputs stay known, so it can be rebuilt (invariant 4)."""
        assert sequence.slot is not None
        plan.preemptions.append(
            Preemption(sequence, sequence.slot, tuple(sequence.blocks), sequence.num_computed)
        )
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed = 0
        sequence.progress.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit_waiting(
        self, plan: Schedule, rows: dict[Sequence, ScheduledRow], budget: int
    ) -> WaitReason:
        """Admit waiting sequences, first come first served; return why it stopped."""
        for sequence in list(self.waiting):
            if not self._free_slots or budget == 0:
                return "capacity"
            leader = self._leader(sequence)
            if leader is not None and leader.num_computed < sequence.num_prompt_tokens - 1:
                continue  # a member of its group is computing the prompt
            if not self._take_prefix(sequence, leader, plan):
                return "kv"
            end = sequence.num_computed + min(sequence.num_to_compute, budget)
            blocks = self.pool.allocate(self._num_missing_blocks(sequence, end))
            assert blocks is not None, "_take_prefix checked that they are there"
            sequence.blocks += blocks
            self._start(sequence, plan)
            rows[sequence] = ScheduledRow(sequence, sequence.num_computed, end)
            budget -= end - sequence.num_computed
        return "capacity"

    def _leader(self, sequence: Sequence) -> Sequence | None:
        """A running sequence with the same prompt whose blocks a fresh one may share."""
        group = sequence.request.group_id
        if group is None or sequence.saved is not None:
            return None
        is_long = sequence.is_long
        return next(
            (s for s in self.running if s.request.group_id == group and s.is_long == is_long), None
        )

    def _take_prefix(self, sequence: Sequence, leader: Sequence | None, plan: Schedule) -> bool:
        """Share computed blocks of the prompt; False if the rest does not fit now.

        A fork shares the full blocks below the last prompt position and copies the partial one:
        the member computes that last position itself and decides on its own.
        """
        size = self.pool.block_size
        num_shared = sequence.num_prompt_tokens - 1 if leader else 0
        if sequence.needs_prompt_logprobs:
            leader, shared, num_shared = None, [], 0
        elif leader is not None:
            shared = leader.blocks[: num_shared // size]
        else:
            shared = self.pool.match(sequence.request.prompt_token_ids, sequence.is_long)
            num_shared = len(shared) * size
        self.pool.share(shared)
        num_missing = -(-sequence.num_known // size) - len(shared)
        # Room for one more block each keeps a new sequence from preempting itself at once.
        reserve = len(self.running)
        if self.pool.num_available < num_missing + reserve and (self.running or plan.rows):
            self.pool.release(shared)
            return False
        sequence.blocks = list(shared)
        sequence.num_computed = num_shared
        if leader is None:
            if sequence.progress.num_preemptions == 0:
                sequence.progress.num_cached_tokens = num_shared
            self.pool.num_queries += sequence.num_prompt_tokens
            self.pool.num_hits += num_shared
        elif num_shared % size:
            tail = self.pool.allocate(1)
            assert tail is not None, "counted in num_missing"
            sequence.blocks += tail
            plan.block_copies.append((leader.blocks[num_shared // size], tail[0]))
        return True

    def _start(self, sequence: Sequence, plan: Schedule) -> None:
        self.waiting.remove(sequence)
        sequence.slot = self._free_slots.popleft()
        sequence.status = SequenceStatus.RUNNING
        if sequence.progress.queue_seconds is None:
            sequence.progress.queue_seconds = time.monotonic() - sequence.arrival_seconds
        self.running.append(sequence)
        plan.admissions.append(sequence)

    def update(self, plan: Schedule, results: list[RowResult]) -> list[RequestOutput]:
        """Apply the results of a step.

        Args:
            plan: What was scheduled.
            results: One for each deciding row, in order.

        Returns:
            The output of each of those rows.
        """
        outputs = []
        remaining = iter(results)
        for row in plan.rows:
            sequence = row.sequence
            is_deciding = row.is_deciding
            sequence.num_computed = row.end
            sequence.progress.num_forward_passes += 1
            self._publish(sequence, row)
            if is_deciding:
                outputs.append(self._apply(sequence, next(remaining)))
        return outputs

    def _publish(self, sequence: Sequence, row: ScheduledRow) -> None:
        """Offer full blocks of prompt ids to the prefix cache (invariant 3)."""
        size, num_prompt = self.pool.block_size, sequence.num_prompt_tokens
        before, after = min(row.start, num_prompt) // size, min(row.end, num_prompt) // size
        if after > before:
            token_ids = sequence.request.prompt_token_ids[: after * size]
            self.pool.publish(sequence.blocks, token_ids, sequence.is_long)

    def _apply(self, sequence: Sequence, result: RowResult) -> RequestOutput:
        """Apply one decision; free the sequence if it is the last."""
        sequence.append(result)
        is_full = sequence.num_ids > self._max_model_len
        is_full |= sequence.num_known >= sequence.request.max_num_positions
        output = sequence.progress.advance(result, is_last=is_full)
        if sequence.prompt_logprobs and not sequence.has_output:
            output = replace(output, prompt_logprobs=tuple(sequence.prompt_logprobs))
        sequence.has_output = True
        if output.finish_reason is not None:
            self._retire(sequence)
        return output

    def _retire(self, sequence: Sequence) -> None:
        """Free everything a sequence holds."""
        if sequence.status is SequenceStatus.RUNNING:
            self._release(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.saved = sequence.replay = None
        del self._by_id[sequence.request.request_id]

    def _release(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        self._free_slots.append(sequence.slot)
        sequence.slot = None

    def count_by_mode(self) -> tuple[dict[str, int], dict[str, int]]:
        """Count running and waiting sequences by mode."""
        running = Counter(s.request.reasoning.mode for s in self.running)
        waiting = Counter(s.request.reasoning.mode for s in self.waiting)
        return dict(running), dict(waiting)

    def check_integrity(self) -> None:
        """Raise AssertionError if blocks, slots or records do not add up (invariant 2)."""
        held = Counter(block for s in self.running for block in s.blocks)
        self.pool.check_integrity(dict(held))
        slots = [s.slot for s in self.running]
        assert None not in slots, "a running sequence has no slot"
        taken = {*slots, *self._free_slots}
        assert len(taken) == len(slots) + len(self._free_slots), "a slot is taken twice"
        live = {s.request.request_id for s in (*self.running, *self.waiting)}
        assert live == set(self._by_id), "a sequence is neither running nor waiting"
