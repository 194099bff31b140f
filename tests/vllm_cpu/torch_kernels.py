"""Torch stand-ins for vLLM's hot Triton kernels, for tests on a CPU alone.

Interpreted, each launch costs milliseconds. These are registered by vLLM's own dispatcher when
COCONUT_TEST_KERNELS=torch, and tests/engines/vllm/test_kernels.py compares each with the
interpreted kernel. They cover what tests run: no drafts, no context parallelism, no fp64 noise.
Parameters are the kernels' own.
"""

import ctypes
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MODULE = "vllm.v1.worker.gpu."
_MASK = 0xFFFFFFFF


def register() -> None:
    """Entry point `vllm.general_plugins`: once in each process."""
    if os.environ.get("COCONUT_TEST_KERNELS") != "torch":
        return
    import vllm.v1.worker.cpu.shm  # noqa: F401 (before any Model Runner V2 module)
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({_MODULE + name: impl for name, impl in KERNELS.items()})
    # The interpreter cannot run this one; vLLM has it in torch too, for machines without Triton.
    from vllm.v1.sample.ops import topk_topp_sampler as filters

    filters.apply_top_k_top_p_triton = filters.apply_top_k_top_p_pytorch


def prepare_prefill_inputs(
    input_ids: Tensor, next_prefill: Tensor, next_stride: int, num_lookahead: int,
    idx_mapping: Tensor, query_start_loc: Tensor, all_token_ids: Tensor, all_stride: int,
    prefill_lens: Tensor, num_computed_tokens: Tensor, **_: Any,
) -> None:  # fmt: skip
    starts = query_start_loc.tolist()
    for i, slot in enumerate(idx_mapping.tolist()):
        done, total = int(num_computed_tokens[slot]), int(prefill_lens[slot])
        if done >= total:
            continue
        start, end = starts[i], starts[i + 1]
        row = all_token_ids[slot]
        input_ids[start:end] = row[done : done + end - start]
        for ahead in range(num_lookahead):
            at = done + end - start + ahead
            next_prefill[ahead, slot] = row[at] if at < total else 0


def prepare_pos_seq_lens(
    pos: Tensor, seq_lens: Tensor, idx_mapping: Tensor, query_start_loc: Tensor,
    num_computed_tokens: Tensor, max_num_reqs: int, **_: Any,
) -> None:  # fmt: skip
    num_rows = idx_mapping.shape[0]
    starts = query_start_loc[: num_rows + 1].long()
    lengths = starts[1:] - starts[:-1]
    done = num_computed_tokens[idx_mapping.long()].long()
    seq_lens[:num_rows] = (done + lengths).to(seq_lens.dtype)
    seq_lens[num_rows:max_num_reqs] = 0
    total = int(starts[-1])
    row = torch.repeat_interleave(torch.arange(num_rows), lengths)
    pos[:total] = done[row] + torch.arange(total) - starts[row]


def combine_sampled_and_draft_tokens(
    input_ids: Tensor, idx_mapping: Tensor, last_sampled: Tensor, query_start_loc: Tensor,
    seq_lens: Tensor, prefill_len: Tensor, draft_tokens: Tensor, draft_stride: int,
    cu_num_logits: Tensor, logits_indices: Tensor, **_: Any,
) -> None:  # fmt: skip
    num_rows = idx_mapping.shape[0]
    at = query_start_loc[1 : num_rows + 1].long() - 1
    logits_indices[:num_rows] = at
    slots = idx_mapping.long()
    is_decode = seq_lens[:num_rows] > prefill_len[slots]
    last = last_sampled[slots].view(-1).to(input_ids.dtype)
    input_ids[at] = torch.where(is_decode, last, input_ids[at])


def get_num_sampled_and_rejected(
    num_sampled: Tensor, num_rejected: Tensor, seq_lens: Tensor, cu_num_logits: Tensor,
    idx_mapping: Tensor, prefill_len: Tensor, **_: Any,
) -> None:  # fmt: skip
    num_rows = idx_mapping.shape[0]
    is_chunk = seq_lens[:num_rows] < prefill_len[idx_mapping.long()]
    num_sampled[:num_rows] = torch.where(is_chunk, 0, num_sampled[:num_rows])
    num_logits = cu_num_logits[1 : num_rows + 1] - cu_num_logits[:num_rows]
    rejected = torch.where(is_chunk, 0, num_logits - num_sampled[:num_rows])
    num_rejected[:num_rows] = rejected.to(num_rejected.dtype)


def post_update(
    idx_mapping: Tensor, num_computed_tokens: Tensor, last_sampled: Tensor,
    output_bin_counts: Tensor | None, bin_stride: int, sampled: Tensor, sampled_stride: int,
    num_sampled: Tensor, num_rejected: Tensor, query_start_loc: Tensor | None,
    all_token_ids: Tensor, all_stride: int, total_len: Tensor, **_: Any,
) -> None:  # fmt: skip
    num_rows = idx_mapping.shape[0]
    rows = torch.arange(num_rows)[(idx_mapping >= 0) & (num_sampled[:num_rows] > 0)]
    slots = idx_mapping[rows].long()
    token = sampled[rows, 0]
    last_sampled[slots, 0] = token.to(last_sampled.dtype)
    all_token_ids[slots, total_len[slots].long()] = token.to(all_token_ids.dtype)
    total_len[slots] += 1
    if output_bin_counts is not None:
        output_bin_counts[slots, token.long()] += 1
    if query_start_loc is not None:
        lengths = query_start_loc[1 : num_rows + 1] - query_start_loc[:num_rows]
        delta = lengths - num_rejected[:num_rows]
        real = idx_mapping >= 0
        at = idx_mapping[real].long()
        num_computed_tokens[at] += delta[real].to(num_computed_tokens.dtype)


def _table(pointers: Tensor, group: int, num_rows: int, stride: int) -> np.ndarray:
    """A block table by its address; [num_rows, stride] int32."""
    kind = ctypes.c_int32 * (num_rows * stride)
    return np.ctypeslib.as_array(kind.from_address(int(pointers[group]))).reshape(num_rows, stride)


def gather_block_tables(
    idx_mapping: Tensor, sources: Tensor, targets: Tensor, strides: Tensor, num_blocks: Tensor,
    num_blocks_stride: int, num_reqs: int, **_: Any,
) -> None:  # fmt: skip
    slots = idx_mapping[:num_reqs].numpy()
    for group, stride in enumerate(strides.tolist()):
        source = _table(sources, group, num_blocks.shape[1], stride)
        target = _table(targets, group, num_reqs, stride)
        for i, slot in enumerate(slots):
            count = int(num_blocks[group, slot])
            target[i, :count] = source[slot, :count]


def compute_slot_mappings(
    max_num_tokens: int, idx_mapping: Tensor, query_start_loc: Tensor, pos: Tensor,
    pointers: Tensor, strides: Tensor, block_sizes: Tensor, enabled: Tensor, dcp_sharded: Tensor,
    slot_mappings: Tensor, slot_stride: int, cp_rank: int, CP_SIZE: int = 1,  # noqa: N803
    CP_INTERLEAVE: int = 1, PAD_ID: int = -1, **_: Any,  # noqa: N803
) -> None:  # fmt: skip
    assert CP_SIZE == 1
    num_rows = idx_mapping.shape[0]
    starts = query_start_loc[: num_rows + 1].tolist()
    lengths = torch.tensor(starts[1:]) - torch.tensor(starts[:-1])
    slots = torch.repeat_interleave(idx_mapping.long(), lengths).numpy()
    positions = pos[: starts[-1]].numpy()
    for group, stride in enumerate(strides.tolist()):
        slot_mappings[group, starts[-1] : max_num_tokens] = PAD_ID
        size = int(block_sizes[group])
        table = _table(pointers, group, int(slots.max(initial=0)) + 1, stride)
        ids = table[slots, positions // size].astype(np.int64) * size + positions % size
        ids = np.where(bool(enabled[group]) & (slots >= 0), ids, PAD_ID)
        slot_mappings[group, : starts[-1]] = torch.from_numpy(ids)


def gumbel_sample(
    local_argmax: Tensor, argmax_stride: int, local_max: Tensor, max_stride: int, cache: None,
    cache_stride_0: int, cache_stride_1: int, cache_col: None, cache_source: None,
    source_stride: int, logits: Tensor, logits_stride: int, idx_mapping: Tensor, seeds: Tensor,
    pos: Tensor, temperature: Tensor, vocab_size: int, **options: Any,
) -> None:  # fmt: skip
    assert cache is None
    assert not options["USE_FP64"]
    assert not options["IS_DRAFTING"]
    slots = idx_mapping.long()
    scores = logits.float()
    temperatures = torch.where(slots >= 0, temperature[slots.clamp_min(0)], 0.0)
    noisy = temperatures.nonzero().squeeze(1)
    if noisy.numel():
        scores = scores.clone()
        if options["APPLY_TEMPERATURE"]:
            scores[noisy] /= temperatures[noisy].unsqueeze(1)
        scores[noisy] += _gumbel(seeds[slots[noisy]], pos[noisy], vocab_size)
    value, index = scores.max(dim=-1)
    local_max.fill_(-torch.inf)
    local_max[:, 0] = value
    local_argmax[:, 0] = index


def _rotate(value: Tensor, shift: int) -> Tensor:
    return ((value << shift) | (value >> (32 - shift))) & _MASK


def _mix(h: Tensor, key: Tensor) -> Tensor:
    """One round of MurmurHash3 (A. Appleby), in 32 bits held by int64."""
    key = _rotate((key * 0xCC9E2D51) & _MASK, 15) * 0x1B873593 & _MASK
    return (_rotate(h ^ key, 13) * 5 + 0xE6546B64) & _MASK


def _gumbel(seed: Tensor, pos: Tensor, size: int) -> Tensor:
    """Noise by seed, position and token; [num_rows] each -> [num_rows, size] float32."""
    seed, pos = seed.long().unsqueeze(1), pos.long().unsqueeze(1)
    h = _mix(torch.zeros_like(seed), seed & _MASK)
    h = _mix(h, (seed >> 32) & _MASK)
    h = _mix(h, pos & _MASK)
    h = _mix(h, torch.arange(size).unsqueeze(0)) ^ 16
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    h = h ^ (h >> 16)
    u = (h.double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u)).float()


def apply_write(
    output: Tensor, stride: Any, indices: Tensor, starts: Tensor, contents: Tensor,
    cu_lens: Tensor, group_ids: Tensor | None, MULTI_GROUP: bool = False, **_: Any,  # noqa: N803
) -> None:  # fmt: skip
    low = 0
    for k, high in enumerate(cu_lens.tolist()):
        row, start = int(indices[k]), int(starts[k])
        if MULTI_GROUP:
            assert group_ids is not None
            group = int(group_ids[k])
            width = int(stride[group])
            target = torch.from_numpy(_table(output, group, row + 1, width))[row]
        else:
            target = output.view(-1) if output.dim() == 1 else output[row]
            start = row if output.dim() == 1 else start
        target[start : start + high - low] = contents[low:high].to(target.dtype)
        low = high


KERNELS = {
    "input_batch._prepare_prefill_inputs_kernel": prepare_prefill_inputs,
    "input_batch._prepare_pos_seq_lens_kernel": prepare_pos_seq_lens,
    "input_batch._combine_sampled_and_draft_tokens_kernel": combine_sampled_and_draft_tokens,
    "input_batch._get_num_sampled_and_rejected_kernel": get_num_sampled_and_rejected,
    "input_batch._post_update_kernel": post_update,
    "block_table._gather_block_tables_kernel": gather_block_tables,
    "block_table._compute_slot_mappings_kernel": compute_slot_mappings,
    "buffer_utils._apply_write_kernel": apply_write,
    "sample.gumbel._gumbel_sample_kernel": gumbel_sample,
}
