"""Device buffers with one row per running sequence: what the next forward pass reads.

The reasoning step writes a slot, the next forward reads it; the host never sees the input in
between. Slots are reused: `admit` of the step, the sampler and each mode set everything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coconut_serve.params import MAX_FORCED_TOKENS, ReasoningParams

EmbedTokens = Callable[[Tensor], Tensor]  # [...] int64 -> [..., hidden_size]


def upload(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Copy numbers to the device without waiting for it; [len(values)]."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def index_of(members: Sequence[int], device: torch.device) -> slice | Tensor:
    """How to index a tensor's rows to take or write `members`.

    A run of neighbours is a slice: taking it copies nothing, so a taken row is not to be written.
    """
    if not members:
        return slice(0)
    start, stop = members[0], members[0] + len(members)
    is_run = members[-1] == stop - 1 and all(m == i for i, m in enumerate(members, start))
    return slice(start, stop) if is_run else upload(members, device)


def take_both(
    logits: Tensor | None, raw: Tensor | None, index: slice | Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Take rows of adjusted and of raw logits; once, where both are one tensor, as they stay."""
    taken = logits[index] if logits is not None else None
    return taken, taken if raw is None or raw is logits else raw[index]


@dataclass(frozen=True, slots=True)
class SlotSnapshot:
    """Everything a sequence needs to go on in another slot after preemption."""

    rows: dict[str, Tensor]  # buffer name -> that slot's row


class Slots:
    """Per-slot state of the reasoning step, on the device.

    Buffers made by `register` survive preemption: `save` copies a slot's rows, `restore` writes
    them into another slot.
    """

    def __init__(
        self, num_slots: int, hidden_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self.hidden_size = hidden_size
        self.device = device
        self._buffers: dict[str, Tensor] = {}
        self.token = self.register("token", torch.int64)  # [num_slots]
        self.vector = self.register("vector", dtype, hidden_size)  # [num_slots, hidden_size]
        self.is_vector = self.register("is_vector", torch.bool)  # [num_slots]
        self.is_thinking = self.register("is_thinking", torch.bool)  # [num_slots]
        self.is_exact = self.register("is_exact", torch.bool)  # the steps are counted out
        self.steps_left = self.register("steps_left", torch.int64)  # [num_slots]
        self.num_decisions = self.register("num_decisions", torch.int64)  # counter of the noise
        self.num_output_tokens = self.register("num_output_tokens", torch.int64)  # of the answer
        self.seed = self.register("seed", torch.int64)  # of the thinking phase
        self.forced = self.register("forced", torch.int64, MAX_FORCED_TOKENS)  # queue, as a ring
        self.forced_left = self.register("forced_left", torch.int64)  # [num_slots]
        self.enter_token = self.register("enter_token", torch.int64)  # -1: none opens a block
        self.blocks_left = self.register("blocks_left", torch.int64)  # that may still be opened
        self.block_steps = self.register("block_steps", torch.int64)  # what steps_left starts at
        self.end = self.register("end", torch.int64, MAX_FORCED_TOKENS)  # what `forced` starts as
        self.num_end = self.register("num_end", torch.int64)  # what forced_left starts at

    def register(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Create a buffer [num_slots, *shape] of zeros that survives preemption."""
        if name in self._buffers:
            raise ValueError(f"slot buffer {name!r} exists")
        buffer = torch.zeros(self.num_slots, *shape, dtype=dtype, device=self.device)
        self._buffers[name] = buffer
        return buffer

    def admit(self, slot: int, params: ReasoningParams, seed: int, next_token_id: int) -> None:
        """Set the slot up for a new sequence whose next input is `next_token_id`."""
        self.token[slot] = next_token_id
        self.is_vector[slot] = False
        opens_at_once = params.enter_token_id is None
        self.is_thinking[slot] = params.steps > 0 and opens_at_once
        self.is_exact[slot] = params.is_fixed
        self.steps_left[slot] = params.steps
        self.num_decisions[slot] = 0
        self.num_output_tokens[slot] = 0
        self.seed[slot] = seed
        self.enter_token[slot] = -1 if params.enter_token_id is None else params.enter_token_id
        self.blocks_left[slot] = 0 if opens_at_once else params.max_blocks
        self.block_steps[slot] = params.steps
        end = params.end_token_ids
        # The queue is read from the front by rolling it, so no read position is kept.
        self.end[slot] = upload(end + (0,) * (MAX_FORCED_TOKENS - len(end)), self.device)
        self.num_end[slot] = params.num_forced
        self.forced[slot] = self.end[slot]
        self.forced_left[slot] = params.num_forced if opens_at_once else 0

    def forbids_stops(self, row_slots: Tensor, min_tokens: Tensor) -> Tensor:
        """Whether rows may not say a stop token yet; where none can end them, all may be said.

        Args:
            row_slots: [n] int64.
            min_tokens: [n] int64, of the answer.

        Returns:
            [n] bool.
        """
        counts_out = self.is_exact[row_slots] & self.is_thinking[row_slots]
        counts_out &= self.steps_left[row_slots] > 0
        return (self.num_output_tokens[row_slots] < min_tokens) & ~counts_out

    def open_blocks(self, row_slots: Tensor, opens: Tensor) -> None:
        """Begin a thinking phase anew in some rows.

        Args:
            row_slots: [num_rows] int64.
            opens: [num_rows] bool.
        """
        rows = row_slots
        self.is_thinking[rows] |= opens
        self.blocks_left[rows] -= opens.to(torch.int64)
        for now, start in (
            (self.steps_left, self.block_steps),
            (self.forced_left, self.num_end),
            (self.forced, self.end),
        ):
            chosen = opens.unsqueeze(1) if now.ndim == 2 else opens
            now[rows] = torch.where(chosen, start[rows], now[rows])

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
        return SlotSnapshot({name: buffer[slot].clone() for name, buffer in self._buffers.items()})

    def restore(self, slot: int, snapshot: SlotSnapshot) -> None:
        """Write a saved state into a slot."""
        for name, row in snapshot.rows.items():
            self._buffers[name][slot] = row
