"""One sequence being generated: the engine's only mutable record."""

import time
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
from torch import Tensor

from coconut_serve.params import Phase
from coconut_serve.reasoning.mode import needs_of
from coconut_serve.reasoning.progress import Progress, RowResult
from coconut_serve.reasoning.settings import SlotSnapshot
from coconut_serve.types import Request, TokenLogprobs


class SequenceStatus(Enum):
    """The life cycle of a sequence."""

    WAITING = auto()  # no slot, no blocks; may hold what preemption saved
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a preempted sequence needs to be rebuilt exactly."""

    snapshot: SlotSnapshot  # holds the pending input, which was not computed yet
    vectors: Tensor  # [num_vector_positions, hidden_size], the fed vectors in order


@dataclass(slots=True, eq=False)
class Sequence:
    """Block table, inputs and status; `progress` tracks its phases.

    Positions [0, num_known) have a known input. All but the last of them are replayable from
    `inputs`: a token id, or None for a fed vector. The input of the last one is in the slot: the
    reasoning step writes it there and the host may never have seen it.
    """

    request: Request
    arrival_seconds: float = field(default_factory=time.monotonic)
    status: SequenceStatus = SequenceStatus.WAITING
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0  # positions whose keys and values are in the blocks
    inputs: list[int | None] = field(default_factory=list)  # by position, the last one pending
    saved: SavedState | None = None
    replay: Tensor | None = None  # [num_vector_positions, hidden_size] while rebuilding
    gaps: list[tuple[int, int]] = field(default_factory=list)  # (position, ids skipped before it)
    progress: Progress = field(init=False)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens 1..
    has_output: bool = False
    is_long: bool = False  # computed with the model's factors for long sequences

    def __post_init__(self) -> None:
        """Start with the prompt as the known inputs."""
        self.inputs = list(self.request.prompt_token_ids)
        self.progress = Progress(self.request, needs_of(self.request.reasoning))

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_known(self) -> int:
        """Positions whose input is known, the pending one included."""
        return len(self.inputs)

    @property
    def num_ids(self) -> int:
        """Position ids up to that of the pending one, skipped ones included."""
        return self.num_known + sum(skipped for _, skipped in self.gaps)

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether prompt positions are still to be scored, so that none may come from a cache."""
        is_asked = self.request.sampling.num_prompt_logprobs is not None
        return is_asked and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    def position_ids(self, start: int, end: int) -> np.ndarray:
        """Position ids that the model gets for positions [start, end); [end - start] int64."""
        ids = np.arange(start, end)
        for first, skipped in self.gaps:
            ids[max(0, first - start) :] += skipped
        return ids

    @property
    def num_to_compute(self) -> int:
        """Known positions that are not in the cache yet; at least 1 while running."""
        return self.num_known - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the pending position is left to compute."""
        return self.num_to_compute == 1

    def append(self, result: RowResult) -> None:
        """Make a decision the new pending input; call before `progress.advance`."""
        progress = self.progress
        ends_phase = progress.is_thinking and result.phase is not Phase.THINK
        if ends_phase and self.request.reasoning.pad_positions:
            self.gaps.append((self.num_known, progress.num_steps_left))
        self.inputs.append(None if result.is_vector else result.token_id)
