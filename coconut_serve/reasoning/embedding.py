"""The model's input embedding, as the reasoning step uses it."""

from collections.abc import Callable

import torch
from torch import Tensor

from coconut_serve.reasoning.slots import EmbedTokens

ROWS_AT_ONCE = 8192  # of the table, where it is processed in parts
_ROWS_COMPARED = 64


class Embedding:
    """Rows by id, and weighted means over the whole vocabulary.

    Args:
        call: The model's own embedding call, which may scale (Gemma does).
        weight: [num_rows, hidden_size], its table; this rank's shard under tensor parallelism.
            None: unavailable (quantised), so means look up every row.
        first_id: The id of the table's first row.
        reduce: Sums over the ranks.
        multiply: A faster [num_rows, vocab_size] @ table, if the engine has one.
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
        self._mean_norm: Tensor | None = None  # [] float32, of the whole vocabulary
        self._scale: Tensor | None = None  # [] float32, what the call multiplies rows by

    def __call__(self, ids: Tensor) -> Tensor:
        """Look rows up; [...] int64 -> [..., hidden_size]."""
        return self._call(ids)

    def _find_scale(self, table: Tensor, num_ids: int) -> Tensor:
        """Compute the call's scale from the norm of the first rows; [] float32.

        One row is not enough: a padding token's may be zeros.
        """
        num_ids = min(num_ids, _ROWS_COMPARED)
        shown = self._call(torch.arange(num_ids, device=table.device))
        stored = table[: max(0, num_ids - self._first_id)]  # those on this rank
        squares = stored.float().square().sum().reshape(1)
        if self._reduce is not None:
            squares = self._reduce(squares)
        scale: Tensor = shown.float().norm() / squares[0].sqrt().clamp_min(1e-12)
        return scale

    def mean(self, weights: Tensor) -> Tensor:
        """Average all embeddings by weight, in one matrix product.

        Args:
            weights: [num_rows, vocab_size] float32.

        Returns:
            [num_rows, hidden_size] in the dtype of the embeddings.
        """
        table, first = self._weight, self._first_id
        if table is None:
            return self._mean_by_rows(weights)
        if self._scale is None:
            self._scale = self._find_scale(table, weights.shape[1])
        part = weights[:, first : first + table.shape[0]]
        part = part.to(table.dtype)
        if self._multiply is not None:
            product = self._multiply(part)
        else:
            product = part @ table[: part.shape[1]]
        whole = self._reduce(product) if self._reduce is not None else product
        return (whole.float() * self._scale).to(table.dtype)

    def mean_norm(self, ids: Tensor) -> Tensor:
        """Compute the mean L2 norm of embeddings; [num_ids] int64 -> [] float32."""
        starts = range(0, len(ids), ROWS_AT_ONCE)
        parts = (self._call(ids[low : low + ROWS_AT_ONCE]) for low in starts)
        return torch.stack([part.float().norm(dim=-1).sum() for part in parts]).sum() / len(ids)

    def mean_norm_of_all(self, vocab_size: int, device: torch.device) -> Tensor:
        """Compute the mean norm over the whole vocabulary, once; [] float32."""
        if self._mean_norm is None:
            self._mean_norm = self.mean_norm(torch.arange(vocab_size, device=device))
        return self._mean_norm

    def _mean_by_rows(self, weights: Tensor) -> Tensor:
        """Average without the table, by looking up one part of the vocabulary at a time."""
        ids = torch.arange(weights.shape[1], device=weights.device)
        first = self._call(ids[:1])
        whole = first.new_zeros(weights.shape[0], first.shape[1], dtype=torch.float32)
        for low in range(0, len(ids), ROWS_AT_ONCE):
            part = slice(low, low + ROWS_AT_ONCE)
            whole += weights[:, part] @ self._call(ids[part]).float()
        return whole.to(first.dtype)
