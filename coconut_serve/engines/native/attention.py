"""Paged attention behind transformers' attention interface, in plain torch.

A step's rows lie one after another in a single batch item. Decode rows (one query each) are
gathered and attended in one call; prefill chunks go one by one. Keys and values are written first,
so a query finds its own.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor, nn
from transformers import AttentionInterface

IMPLEMENTATION = "coconut_paged"
# Above this many gathered positions, attending row by row beats padding all to the longest.
_MAX_GATHERED_POSITIONS = 8192


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """Attention with the settings of one layer."""

    scale: float
    window: int | None
    softcap: float | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attend q [b, h, n, d] to k, v [b, h, m, d] where `mask` (broadcast, bool) is true."""
        if self.softcap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        scores = (q @ k.transpose(-1, -2)) * self.scale
        scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


class Plan(ABC):
    """What a step hands to every attention layer."""

    @abstractmethod
    def attend(self, layer: int, attend: LayerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend one layer; q, k, v [heads, num_rows, d] -> [num_rows, heads, d].

        Rows beyond those of the plan pad the step: nothing is written for them, and zeros come out.
        """


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of query rows of one sequence that attends to positions [0, end)."""

    first_row: int
    num_rows: int
    end: int  # positions in the cache after this step
    slots: Tensor  # [end] int64, cache slot of each position


@dataclass(slots=True)
class AttentionPlan(Plan):
    """Where each row of a step writes and reads; made once a step, used by every layer."""

    write_slots: Tensor  # [num_rows] int64, cache slot of each row
    num_decode: int  # rows [0, num_decode) are decode rows
    decode_slots: Tensor  # [num_decode, max_len] int64, padded with the null block's slots
    decode_lengths: Tensor  # [num_decode] int64
    chunks: list[Chunk]
    caches: list[tuple[Tensor, Tensor]]  # by layer: keys, values [num_slots, kv_heads, head_dim]
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def decode_mask(self, window: int | None) -> Tensor:
        """Which gathered positions a decode row sees; [num_decode, 1, 1, max_len] bool."""
        if window not in self._masks:
            position = torch.arange(self.decode_slots.shape[1], device=self.decode_slots.device)
            length = self.decode_lengths.unsqueeze(1)
            seen = position < length
            if window is not None:
                seen = seen & (position >= length - window)
            self._masks[window] = seen[:, None, None, :]
        return self._masks[window]

    def attend(self, layer: int, attend: LayerAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write keys and values, attend; q, k, v [heads, num_rows, d] -> [num_rows, heads, d]."""
        keys, values = self.caches[layer]
        num_rows, num_padding = len(self.write_slots), q.shape[1] - len(self.write_slots)
        k, v = k[:, :num_rows], v[:, :num_rows]
        keys.index_copy_(0, self.write_slots, k.transpose(0, 1).to(keys.dtype))
        values.index_copy_(0, self.write_slots, v.transpose(0, 1).to(values.dtype))
        outputs = []
        if self.num_decode:
            outputs.append(_decode(attend, q[:, : self.num_decode], keys, values, self))
        for chunk in self.chunks:
            rows = q[:, chunk.first_row : chunk.first_row + chunk.num_rows]
            outputs.append(_prefill(attend, rows, keys, values, chunk))
        if num_padding:
            first = outputs[0]
            outputs.append(first.new_zeros(num_padding, *first.shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def register() -> None:
    """Register IMPLEMENTATION with transformers; idempotent."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_rows, head_dim]
    key: Tensor,  # [1, num_kv_heads, num_rows, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: Plan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Pass one layer's call to the step's plan; returns [1, num_rows, num_heads, head_dim]."""
    if attention_mask is not None or s_aux is not None or position_bias is not None:
        raise NotImplementedError("its attention has a mask, sinks or a bias of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = LayerAttention(scale=scale, window=sliding_window, softcap=softcap)
    layer = module.layer_idx
    assert isinstance(layer, int)
    return plan.attend(layer, attend, query[0], key[0], value[0]).unsqueeze(0), None


def _decode(
    attend: LayerAttention, q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan
) -> Tensor:
    """Attend one query a row; q [num_heads, num_rows, d] -> [num_rows, num_heads, d]."""
    num_heads, num_rows, dim = q.shape
    kv_heads = keys.shape[1]
    # Heads that share a key head become queries of one call: no repeated keys.
    q = q.transpose(0, 1).reshape(num_rows, kv_heads, num_heads // kv_heads, dim)
    mask, slots = plan.decode_mask(attend.window), plan.decode_slots
    if slots.numel() <= _MAX_GATHERED_POSITIONS or slots.is_cuda:
        out = attend(q, _gather(keys, slots), _gather(values, slots), mask)
    else:
        rows = []
        for i, length in enumerate(plan.decode_lengths.tolist()):
            at = slots[i : i + 1, :length]
            seen = mask[i : i + 1, ..., :length]
            rows.append(attend(q[i : i + 1], _gather(keys, at), _gather(values, at), seen))
        out = torch.cat(rows)
    return out.reshape(num_rows, num_heads, -1)


def _gather(cache: Tensor, slots: Tensor) -> Tensor:
    """Read [num_rows, num_kv_heads, length, d] from a cache at slots [num_rows, length]."""
    num_rows, length = slots.shape
    taken = cache.view(cache.shape[0], -1).index_select(0, slots.flatten())
    return taken.view(num_rows, length, *cache.shape[1:]).transpose(1, 2)


def _prefill(
    attend: LayerAttention, q: Tensor, keys: Tensor, values: Tensor, chunk: Chunk
) -> Tensor:
    """Attend a chunk of one sequence; q [num_heads, num_rows, d] -> [num_rows, num_heads, d]."""
    num_heads, num_rows, dim = q.shape
    slots = chunk.slots.unsqueeze(0)
    k, v = _gather(keys, slots), _gather(values, slots)  # [1, kv_heads, end, d]
    position = torch.arange(chunk.end, device=q.device)
    at = position[chunk.end - num_rows :].unsqueeze(1)  # [num_rows, 1], the queries' positions
    mask = position <= at  # [num_rows, end]
    if attend.window is not None:
        mask &= position > at - attend.window
    groups = num_heads // keys.shape[1]
    q = q.reshape(1, keys.shape[1], groups * num_rows, dim)
    out = attend(q, k, v, mask.repeat(groups, 1))  # [1, kv_heads, groups * num_rows, d]
    return out.reshape(num_heads, num_rows, -1).transpose(0, 1)
