"""Builds the tensors of one step from its schedule."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coconut_serve.engines.native.attention import AttentionPlan, Chunk
from coconut_serve.engines.native.block_pool import NULL_BLOCK
from coconut_serve.engines.native.scheduler import Schedule, ScheduledRow
from coconut_serve.engines.native.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Prompt positions whose logits score the prompt's next tokens."""

    sequence: Sequence
    first_row: int
    next_ids: tuple[int, ...]  # one a row


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All tensors of a step; rows are positions, decode rows first."""

    token_ids: Tensor  # [num_rows] int64; 0 where a vector or a slot's input goes
    positions: Tensor  # [num_rows] int64, position ids
    plan: AttentionPlan
    replay_rows: Tensor | None  # [num_replayed] int64, rows that repeat a fed vector
    replay_vectors: Tensor | None  # [num_replayed, hidden_size]
    pending_rows: Tensor  # [num_deciding] int64, rows whose input is in a slot
    pending_slots: Tensor  # [num_deciding] int64
    deciding: list[Sequence]
    scored: list[ScoredRows]
    is_long: Tensor | None  # [num_rows] bool, rows of long sequences; None: there are none

    @property
    def is_pure_decode(self) -> bool:
        """Whether every row reads its input from a slot."""
        return self.pending_rows.shape[0] == self.token_ids.shape[0]


class BatchBuilder:
    """Builds step batches; keeps the block table of each slot on the host.

    Args:
        num_slots: Sequences that run at once.
        max_model_len: Positions of a sequence.
        block_size: Positions of a block.
        caches: Keys and values by layer.
        device: Where the step runs.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_model_len: int,
        block_size: int,
        caches: list[tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        self._block_size = block_size
        self._caches = caches
        self._device = device
        max_blocks = -(-max_model_len // block_size)
        self._table = np.zeros((num_slots, max_blocks), dtype=np.int64)  # slot -> blocks
        self._num_tabled = [0] * num_slots
        self._offsets = np.arange(block_size)

    def admit(self, slot: int) -> None:
        """Forget the blocks of the slot's last owner."""
        self._num_tabled[slot] = 0

    def build(self, schedule: Schedule) -> StepBatch:
        for row in schedule.rows:
            self._follow_blocks(row.sequence)
        decode = [row for row in schedule.rows if row.is_decode]
        token_ids: list[int] = []
        positions: list[np.ndarray] = []
        write_slots: list[np.ndarray] = []
        chunks: list[Chunk] = []
        pending: list[int] = []
        scored: list[ScoredRows] = []
        replay_rows: list[int] = []
        replay_vectors: list[Tensor] = []
        for row in schedule.rows:
            first_row = len(token_ids)
            num_explicit = row.end - row.start - row.is_deciding
            explicit = row.sequence.inputs[row.start : row.start + num_explicit]
            vector_rows = [first_row + i for i, token in enumerate(explicit) if token is None]
            if row.sequence.needs_prompt_logprobs:
                scored += _scored(row, first_row)
            if vector_rows:
                replay_rows += vector_rows
                replay_vectors.append(_replayed(row, len(vector_rows)))
            token_ids += [0 if token is None else token for token in explicit]
            if row.is_deciding:
                pending.append(len(token_ids))
                token_ids.append(0)
            cache_slots = self._cache_slots(row.sequence, row.end)
            positions.append(row.sequence.position_ids(row.start, row.end))
            write_slots.append(cache_slots[row.start :])
            if not row.is_decode:
                chunk_slots = self._tensor(cache_slots)
                chunks.append(Chunk(first_row, row.end - row.start, row.end, chunk_slots))
        deciding = [row.sequence for row in schedule.rows if row.is_deciding]
        slots, lengths = self._decode_slots(decode)
        is_long = np.repeat(
            [row.sequence.is_long for row in schedule.rows],
            [row.end - row.start for row in schedule.rows],
        )
        return StepBatch(
            token_ids=self._tensor(np.array(token_ids, dtype=np.int64)),
            positions=self._tensor(np.concatenate(positions)),
            plan=AttentionPlan(
                write_slots=self._tensor(np.concatenate(write_slots)),
                num_decode=len(decode),
                decode_slots=slots,
                decode_lengths=lengths,
                chunks=chunks,
                caches=self._caches,
            ),
            replay_rows=self._tensor(np.array(replay_rows)) if replay_rows else None,
            replay_vectors=torch.cat(replay_vectors) if replay_vectors else None,
            pending_rows=self._tensor(np.array(pending, dtype=np.int64)),
            pending_slots=self._tensor(np.array([s.slot for s in deciding], dtype=np.int64)),
            deciding=deciding,
            scored=scored,
            is_long=self._tensor(is_long) if is_long.any() else None,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _follow_blocks(self, sequence: Sequence) -> None:
        """Add the blocks allocated to a sequence since its last step to its table."""
        slot = sequence.slot
        assert slot is not None
        done, count = self._num_tabled[slot], len(sequence.blocks)
        if done < count:
            self._table[slot, done:count] = sequence.blocks[done:]
            self._num_tabled[slot] = count

    def _cache_slots(self, sequence: Sequence, end: int) -> np.ndarray:
        """Cache slots of positions [0, end)."""
        blocks = self._table[sequence.slot, : -(-end // self._block_size)]
        slots: np.ndarray = (blocks[:, None] * self._block_size + self._offsets).reshape(-1)[:end]
        return slots

    def _decode_slots(self, rows: list[ScheduledRow]) -> tuple[Tensor, Tensor]:
        """Cache slots that decode rows read, padded with the null block, and their lengths."""
        lengths = np.array([row.end for row in rows], dtype=np.int64)
        if not rows:
            return self._tensor(np.zeros((0, 0), dtype=np.int64)), self._tensor(lengths)
        max_len = int(lengths.max())
        blocks = self._table[
            np.array([row.sequence.slot for row in rows], dtype=np.int64),
            : -(-max_len // self._block_size),
        ]
        slots = (blocks[:, :, None] * self._block_size + self._offsets).reshape(len(rows), -1)
        slots = np.where(np.arange(max_len) < lengths[:, None], slots[:, :max_len], NULL_BLOCK)
        return self._tensor(slots), self._tensor(lengths)


def _scored(row: ScheduledRow, first_row: int) -> list[ScoredRows]:
    """Find the rows of prompt positions that are not scored yet and have a next token."""
    sequence = row.sequence
    ids = sequence.request.prompt_token_ids
    start, end = max(row.start, len(sequence.prompt_logprobs)), min(row.end, len(ids) - 1)
    if start >= end:
        return []
    return [ScoredRows(sequence, first_row + start - row.start, ids[start + 1 : end + 1])]


def _replayed(row: ScheduledRow, count: int) -> Tensor:
    """The vectors that were fed at this row's vector positions; [count, hidden_size]."""
    sequence = row.sequence
    assert sequence.replay is not None, "a vector position is recomputed without its vector"
    first = sum(token is None for token in sequence.inputs[: row.start])
    return sequence.replay[first : first + count]
