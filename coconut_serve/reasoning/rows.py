"""What one step knows and has decided about its rows."""

import torch
from torch import Tensor

from coconut_serve.reasoning.plan import RowPlan
from coconut_serve.reasoning.sampling import TokenSampler
from coconut_serve.reasoning.slots import Slots, index_of, take_both, upload


class StepRows:
    """Tensors of one step, [num_rows, ...] unless noted; each stage of the step adds its own."""

    def __init__(self, rows: list[RowPlan], hidden: Tensor, slots: Slots) -> None:
        num_rows, device = len(rows), hidden.device
        self.rows = rows
        self.hidden = hidden
        self.host_slots = tuple(row.slot for row in rows)
        self.row_slots = upload(self.host_slots, device)
        self.raw_logits: Tensor | None = None  # [num_logit_rows, vocab_size]
        self.logits: Tensor | None = None  # the same, adjusted
        self._logit_row: dict[int, int] = {}  # row -> its row in the logits
        self.sampled = torch.full((num_rows,), -1, dtype=torch.int64, device=device)
        self.answer = self.sampled  # the same for the answer, if `draws_apart`
        self.text = self.sampled.clone()  # the token a thinking step stands for
        self.token = self.sampled  # the decision: next input, or the text of a vector
        self.halt = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.thinks = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.is_forced = self.thinks.clone()
        self.is_switch = self.thinks.clone()  # between tokens and vectors
        self.adds_end = self.thinks.clone()  # the end token is added to the last vector
        self.is_vector = self.thinks.clone()
        self.is_bad_vector = self.thinks.clone()  # NaN or Inf in the vector to feed
        self.is_bad_sample = self.thinks.clone()  # NaN or Inf in the sampled logits
        self.vector = torch.zeros(
            num_rows, slots.hidden_size, dtype=slots.vector.dtype, device=device
        )
        self.retained_mass = torch.ones(num_rows, device=device)

    def select(self, tensor: Tensor, members: list[int]) -> Tensor:
        """Take rows to read; see index_of."""
        return tensor[index_of(members, tensor.device)]

    def assign(self, tensor: Tensor, members: list[int], values: Tensor) -> None:
        """Write rows in place."""
        tensor[index_of(members, tensor.device)] = values

    def assign_vectors(
        self, members: list[int], vectors: Tensor, is_vector: Tensor | None = None
    ) -> None:
        """Set the vectors that rows feed next: all of `members`, or those in `is_vector`."""
        vectors = vectors.to(self.vector.dtype)
        # NaN or Inf must end only its own row: zeroing it here keeps it from spreading.
        is_finite = vectors.isfinite().all(-1)
        flags = torch.ones_like(is_finite) if is_vector is None else is_vector
        self.assign(self.is_bad_vector, members, flags & ~is_finite)
        self.assign(self.vector, members, torch.where(is_finite.unsqueeze(1), vectors, 0.0))
        self.assign(self.is_vector, members, flags)

    def spread(self, values: Tensor, members: list[int]) -> Tensor:
        """Expand the members' values to all rows of the step, with zeros for the others."""
        if len(members) == len(self.rows):
            return values
        whole = values.new_zeros(len(self.rows), values.shape[1])
        self.assign(whole, members, values)
        return whole

    def set_logits(self, members: list[int], raw: Tensor, adjusted: Tensor) -> None:
        """Store the logits of `members`, in that order; [len(members), vocab_size] float32."""
        self.raw_logits, self.logits = raw, adjusted
        self._logit_row = {row: k for k, row in enumerate(members)}

    def logits_of(self, members: list[int], *, is_raw: bool = False) -> Tensor:
        """Return the logits of rows that have them; [len(members), vocab_size]."""
        logits = self.raw_logits if is_raw else self.logits
        assert logits is not None
        return self.select(logits, [self._logit_row[i] for i in members])

    def both_logits_of(self, members: list[int]) -> tuple[Tensor | None, Tensor | None]:
        """Return adjusted and raw logits of rows that have them; [len(members), vocab_size]."""
        index = index_of([self._logit_row[i] for i in members], self.hidden.device)
        return take_both(self.logits, self.raw_logits, index)

    def draw_apart(self, sampler: TokenSampler) -> None:
        """Resample thinking tokens in rows that have sampling settings for thinking."""
        members = [i for i, row in enumerate(self.rows) if row.draws_apart]
        if not members:
            return
        self.answer = self.sampled.clone()
        host_slots = tuple(self.rows[i].slot for i in members)
        rows = self.select(self.row_slots, members)
        drawn, _ = sampler.sample(self.logits_of(members), rows, host_slots)
        self.assign(self.sampled, members, drawn)

    @property
    def emitted(self) -> Tensor:
        """The token each row emits, -1 for none and for forced ones; [num_rows] int64."""
        return torch.where(self.is_forced, -1, self.token)
