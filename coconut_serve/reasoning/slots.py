"""Device buffers with one row per running sequence: what the next forward pass reads.

The reasoning step writes a slot and the next forward pass reads it; the host never sees the input.
A row of the table holds settings, which the host mirrors, and then state. Slots are reused:
`admit` sets every column, with one upload for all rows of a step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from coconut_serve.params import MAX_FORCED_TOKENS
from coconut_serve.reasoning.settings import (
    WORD_BYTES,
    Admission,
    Rows,
    SlotSnapshot,
    settings_layout,
)

EmbedTokens = Callable[[Tensor], Tensor]  # [...] int64 -> [..., hidden_size]
Start = float | Callable[[Admission], float | Iterable[float]]  # of state

_MAX_STATE_WORDS = 128  # of a row; more than the current modes and rules need


def upload(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Copy numbers to the device without waiting for it; [len(values)]."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def index_of(members: Sequence[int], device: torch.device) -> slice | Tensor:
    """Return the index of `members` among a tensor's rows.

    Adjacent rows are a slice, so indexing with it gives a view: do not write to the result.
    """
    if not members:
        return slice(0)
    start, stop = members[0], members[0] + len(members)
    is_run = members[-1] == stop - 1 and all(m == i for i, m in enumerate(members, start))
    return slice(start, stop) if is_run else upload(members, device)


def take_both(
    logits: Tensor | None, raw: Tensor | None, index: slice | Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Take rows of adjusted and raw logits; if both are one tensor, they stay one."""
    taken = logits[index] if logits is not None else None
    return taken, taken if raw is None or raw is logits else raw[index]


def send(words: np.ndarray, device: torch.device) -> Tensor:
    """Copy what a step's admissions write to the device, in one upload; int64 -> the same."""
    sent = torch.from_numpy(words)
    return sent if device.type == "cpu" else sent.pin_memory().to(device, non_blocking=True)


class Slots:
    """Settings and state of all slots, on the device.

    State from `register` and `register_large` survives preemption: `save` copies it, and the
    sequence's next admission restores it into its new slot.
    """

    def __init__(
        self, num_slots: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self.hidden_size = hidden_size
        self.device = device
        self.admitted = [Admission(slot=slot) for slot in range(num_slots)]  # the latest of each
        self._layout = settings_layout()
        self._state_at = self._layout.num_words
        num_words = self._state_at + _MAX_STATE_WORDS
        self._table = torch.zeros(num_slots, num_words, dtype=torch.int64, device=device)
        self._mirror = np.zeros((num_slots, self._state_at), dtype=np.int64)
        columns = self._layout.columns.items()
        self._settings = {name: column.of(self._table) for name, column in columns}
        self._host = {name: column.of_host(self._mirror) for name, column in columns}
        self._buffers: dict[str, Tensor] = {}
        self.seed = self._settings["seed"]  # [num_slots] int64
        self.vector = self.register_large("vector", dtype, hidden_size)
        # [num_slots] each:
        self.token = self.register("token", torch.int64, start=lambda a: a.next_token_id)
        self.is_vector = self.register("is_vector", torch.bool)
        self.is_thinking = self.register("is_thinking", torch.bool, start=_thinks)
        self.steps_left = self.register("steps_left", torch.int64, start=_num_steps)
        self.num_decisions = self.register("num_decisions", torch.int64)  # the noise's counter
        self.num_output_tokens = self.register("num_output_tokens", torch.int64)  # of the answer
        self.forced_left = self.register("forced_left", torch.int64, start=_num_forced)
        self.blocks_left = self.register("blocks_left", torch.int64, start=_num_blocks)
        # Reading the queue rolls it, so it needs no read position.
        self.forced = self.register("forced", torch.int64, MAX_FORCED_TOKENS, start=_forced)

    def register(
        self, name: str, dtype: torch.dtype, width: int | None = None, *, start: Start = 0
    ) -> Tensor:
        """Create state of a few numbers for each slot.

        Args:
            name: Of the state.
            dtype: int64, float32 or bool.
            width: Of lists; None: one number.
            start: Its value on admission, or a function that reads it from the admission.

        Returns:
            A view of the table, [num_slots] or [num_slots, width].

        Raises:
            ValueError: The name is taken, or the row is full.
        """

        def read(admission: Admission) -> Iterable[float]:
            value = start(admission) if callable(start) else start
            return value if isinstance(value, Iterable) else (value,) * (width or 1)

        column = self._layout.add(name, dtype, width, read)
        if self._layout.num_words > self._table.shape[1]:
            raise ValueError(f"no room for {name!r}: raise _MAX_STATE_WORDS, or register_large")
        return column.of(self._table)

    def register_large(self, name: str, dtype: torch.dtype, width: int) -> Tensor:
        """Create state in its own tensor, zeros [num_slots, width], which no admission resets.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._buffers:
            raise ValueError(f"slot buffer {name!r} exists")
        buffer = torch.zeros(self.num_slots, width, dtype=dtype, device=self.device)
        self._buffers[name] = buffer
        return buffer

    def settings(self, row_slots: Tensor, prefix: str = "") -> Rows[Tensor]:
        """Return the rows' settings on the device; [num_rows] int64."""
        return Rows(self._settings, row_slots, prefix)

    def host(self, host_slots: Sequence[int], prefix: str = "") -> Rows[np.ndarray]:
        """Return their host copies, so a step can skip kernels no row needs."""
        return Rows(self._host, list(host_slots), prefix)

    def admit(
        self, admissions: Sequence[Admission], lists: Sequence[Sequence[int]] = ()
    ) -> list[Tensor]:
        """Set up all slots that a step admits.

        Args:
            admissions: Of different slots.
            lists: More numbers to upload.

        Returns:
            The lists on the device; [len(list)] int64 each.
        """
        num_rows, num_words = len(admissions), self._table.shape[1]
        rows = b"".join(
            self._layout.pack(each).ljust(num_words * WORD_BYTES, b"\0") for each in admissions
        )
        words = np.frombuffer(rows, dtype=np.int64)
        parts = [words, *(np.asarray(each, dtype=np.int64) for each in lists)]
        sent = torch.split(send(np.concatenate(parts), self.device), [len(p) for p in parts])
        table = sent[0].view(num_rows, num_words)
        self._table.index_copy_(0, self._layout.columns["slot"].of(table), table)
        slots = [each.slot for each in admissions]
        self._mirror[slots] = words.reshape(num_rows, num_words)[:, : self._state_at]
        for each in admissions:
            self.admitted[each.slot] = replace(each, snapshot=None)
            if each.snapshot is not None:
                self._restore(each.slot, each.snapshot)
        return list(sent[1:])

    def forbids_stops(self, row_slots: Tensor, min_tokens: Tensor) -> Tensor:
        """Whether min_tokens still forbids stop tokens; never in steps that they cannot end.

        Args:
            row_slots: [n] int64.
            min_tokens: [n] int64, of the answer.

        Returns:
            [n] bool.
        """
        counts_out = self.settings(row_slots).is_fixed & self.is_thinking[row_slots]
        counts_out &= self.steps_left[row_slots] > 0
        return (self.num_output_tokens[row_slots] < min_tokens) & ~counts_out

    def open_blocks(self, row_slots: Tensor, opens: Tensor) -> None:
        """Start another thinking phase in some rows.

        Args:
            row_slots: [num_rows] int64.
            opens: [num_rows] bool.
        """
        rows, settings = row_slots, self.settings(row_slots)
        self.is_thinking[rows] |= opens
        self.blocks_left[rows] -= opens.to(torch.int64)
        for now, start in (
            (self.steps_left, settings.steps),
            (self.forced_left, settings.num_forced),
            (self.forced, settings.end_token_ids),
        ):
            chosen = opens.unsqueeze(1) if now.ndim == 2 else opens
            now[rows] = torch.where(chosen, start, now[rows])

    def embed(self, embed_tokens: EmbedTokens, row_slots: Tensor) -> Tensor:
        """Build the next inputs.

        Args:
            embed_tokens: The model's own embedding call (it may scale, as Gemma does).
            row_slots: [num_rows] int64.

        Returns:
            [num_rows, hidden_size] in the model's dtype.
        """
        tokens = embed_tokens(self.token[row_slots])  # [num_rows, hidden_size]
        is_vector = self.is_vector[row_slots].unsqueeze(1)  # [num_rows, 1]
        return torch.where(is_vector, self.vector[row_slots].to(tokens.dtype), tokens)

    def save(self, slot: int) -> SlotSnapshot:
        """Copy the slot's state; the slot may be reused afterwards."""
        buffers = {name: buffer[slot].clone() for name, buffer in self._buffers.items()}
        return SlotSnapshot(self._table[slot, self._state_at :].clone(), buffers)

    def _restore(self, slot: int, snapshot: SlotSnapshot) -> None:
        self._table[slot, self._state_at :] = snapshot.row
        for name, row in snapshot.buffers.items():
            self._buffers[name][slot] = row


def _thinks(admission: Admission) -> bool:
    params = admission.reasoning
    return params.steps > 0 and params.enter_token_id is None


def _num_steps(admission: Admission) -> int:
    return admission.reasoning.steps if admission.counts_steps else 0


def _num_forced(admission: Admission) -> int:
    params = admission.reasoning
    return params.num_forced if params.enter_token_id is None else 0


def _num_blocks(admission: Admission) -> int:
    params = admission.reasoning
    return 0 if params.enter_token_id is None else params.max_blocks


def _forced(admission: Admission) -> tuple[int, ...]:
    end = admission.reasoning.end_token_ids
    return end + (0,) * (MAX_FORCED_TOKENS - len(end))
