"""Linear layers with weights packed once into oneDNN's own layout (CPU).

Packing removes the reordering that every plain call pays; with few rows that is a large part of
the call. The operators are the ones torch's own compiler emits when it freezes a model; they are
private, so each dtype is checked against F.linear once and left alone if it differs.
"""

import logging
from typing import TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

_PACKABLE = (torch.bfloat16, torch.float32)
MIN_ROWS = 5  # oneDNN takes up to 1.8 times as long for 1, 2 or 3 rows as for 5 (AVX-512)


def pad_rows(x: Tensor) -> Tensor:
    """Add zeros below until there are MIN_ROWS; [num_rows, ...] -> [max(num_rows, MIN_ROWS), ...].

    A single row then also goes through the same kernel as a few.
    """
    missing = MIN_ROWS - x.shape[0]
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing > 0 else x


class PackedLinear(nn.Module):
    """A linear layer [in_features] -> [out_features] whose weight is packed."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._packed: Tensor = packed
        self._bias = bias
        self.nbytes = weight.nbytes  # a bias stays a parameter

    def forward(self, x: Tensor) -> Tensor:
        """Compute x W^T + b; x [..., in_features] -> [..., out_features].

        Callers apply `pad_rows` to few rows.
        """
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._packed, self._bias, "none", [], ""
        )
        return out


def can_pack(dtype: torch.dtype) -> bool:
    """Whether packed linears work here and agree with plain ones in this dtype."""
    if dtype not in _PACKABLE or not torch._C._has_mkldnn:
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(3, 32, generator=generator).to(dtype)
    try:
        packed = PackedLinear(weight, bias)(x)
    except (RuntimeError, AttributeError) as error:  # the private operators moved
        logger.warning("packed linears are off, expect half the speed: %s", error)
        return False
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    return torch.allclose(packed, F.linear(x, weight, bias), atol=tolerance, rtol=tolerance)


class PackedTable:
    """A table as the right operand of a product, packed on first use.

    Args:
        table: [num_rows, width].
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table
        self._packed: PackedLinear | None = None

    def __call__(self, weights: Tensor) -> Tensor:
        """Multiply; [n, num_rows] -> [n, width]."""
        if self._packed is None:
            self._packed = PackedLinear(self._table.t().contiguous(), None)
        product: Tensor = self._packed(pad_rows(weights))
        return product[: weights.shape[0]]


def pack_linears(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace the model's linear layers by packed ones, in place.

    A head tied to the embedding is packed too, which is worth one more copy of that matrix.

    Returns:
        How many layers were replaced; 0 where packing does not work.
    """
    if not can_pack(dtype):
        return 0
    num_packed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, PackedLinear) or not _is_plain(child):
                continue
            weight: Tensor = child.weight.t() if isinstance(child, Conv1D) else child.weight
            if weight.dtype != dtype:
                continue
            setattr(module, name, PackedLinear(weight.contiguous(), child.bias))
            num_packed += 1
    return num_packed


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Only the stock layers: a subclass may do more than multiply."""
    return type(module) in (nn.Linear, Conv1D)
