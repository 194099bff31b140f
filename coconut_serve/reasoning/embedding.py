"""The model's input embedding, as the reasoning step uses it."""

from collections.abc import Callable

import torch
from torch import Tensor

from coconut_serve.reasoning.slots import EmbedTokens

ROWS_AT_ONCE = 8192  # of a table that is worked through in parts


class Embedding:
    """Rows by id, and weighted means over the whole vocabulary.

    Args:
        call: The model's own embedding call, which may scale (Gemma does).
        weight: [num_rows, hidden_size], its table; this rank's part under tensor parallelism.
            None: it is not to be had (quantised), and means are taken by looking all rows up.
        first_id: The id of the table's first row.
        reduce: Adds up what each rank computed.
        multiply: A faster way to [num_rows, vocab_size] @ table, where the engine has one.
    """

    def __init__(
        self,
        call: EmbedTokens,
        weight: Tensor | None,
        *,
        first_id: int = 0,
        reduce: Callable[[Tensor], Tensor] | None = None,
        multiply: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._call = call
        self._weight = weight
        self._first_id = first_id
        self._reduce = reduce
        self._multiply = multiply
        self._scale: Tensor | None = None  # [1], what the call multiplies rows by

    def __call__(self, ids: Tensor) -> Tensor:
        """Look rows up; [...] int64 -> [..., hidden_size]."""
        return self._call(ids)

    @property
    def scale(self) -> Tensor:
        """What the call multiplies the table's rows by; [1] float32."""
        if self._scale is None:
            assert self._weight is not None
            ids = torch.arange(self._first_id, self._first_id + 1, device=self._weight.device)
            shown, stored = self._call(ids).float(), self._weight[:1].float()
            self._scale = (shown.norm() / stored.norm().clamp_min(1e-12)).reshape(1)
            if self._reduce is not None:  # each rank has rows of its own, and all scale alike
                self._scale = self._reduce(self._scale) / self._reduce(torch.ones_like(self._scale))
        return self._scale

    def mean(self, weights: Tensor) -> Tensor:
        """Average all embeddings by weight, as one matrix product.

        Args:
            weights: [num_rows, vocab_size] float32.

        Returns:
            [num_rows, hidden_size] in the dtype of the embeddings.
        """
        table, first = self._weight, self._first_id
        if table is None:
            return self._mean_by_rows(weights)
        part = weights[:, first : first + table.shape[0]]
        part = part.to(table.dtype)
        if self._multiply is not None:
            product = self._multiply(part)
        else:
            product = part @ table[: part.shape[1]]
        whole = self._reduce(product) if self._reduce is not None else product
        return (whole.float() * self.scale).to(table.dtype)

    def mean_norm(self, ids: Tensor) -> Tensor:
        """The mean length of embeddings; [num_ids] int64 -> [] float32."""
        starts = range(0, len(ids), ROWS_AT_ONCE)
        parts = (self._call(ids[low : low + ROWS_AT_ONCE]) for low in starts)
        return torch.stack([part.float().norm(dim=-1).sum() for part in parts]).sum() / len(ids)

    def _mean_by_rows(self, weights: Tensor) -> Tensor:
        """The same, by calls for a part of the vocabulary at a time."""
        ids = torch.arange(weights.shape[1], device=weights.device)
        first = self._call(ids[:1])
        whole = first.new_zeros(weights.shape[0], first.shape[1], dtype=torch.float32)
        for low in range(0, len(ids), ROWS_AT_ONCE):
            part = slice(low, low + ROWS_AT_ONCE)
            whole += weights[:, part] @ self._call(ids[part]).float()
        return whole.to(first.dtype)
