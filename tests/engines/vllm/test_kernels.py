"""Each torch stand-in of tests/vllm_cpu does what the interpreted Triton kernel does."""

import copy
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

ROWS, SLOTS, VOCAB = 3, 8, 3000


@pytest.fixture(autouse=True)
def _ready() -> None:
    import vllm.v1.worker.cpu.shm  # noqa: F401 (before any Model Runner V2 module)


def compare(name: str, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: Any) -> None:
    """Run kernel and stand-in on copies of the same tensors; all of them must end up equal."""
    import importlib

    import torch
    from torch_kernels import KERNELS

    module, attribute = name.rsplit(".", 1)
    kernel = getattr(importlib.import_module(f"vllm.v1.worker.gpu.{module}"), attribute)
    ours, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
    kernel[grid](*theirs, **options)
    KERNELS[name](*ours, **options)
    for position, (mine, right) in enumerate(zip(ours, theirs, strict=True)):
        if isinstance(right, torch.Tensor):
            assert torch.equal(mine, right), f"{name}: argument {position}"


def batch() -> dict[str, Any]:
    """Slots 5, 2 and 7: a prefill chunk of 4, a decode, the last 2 positions of a prefill."""
    import torch

    def of(*values: int) -> Any:
        return torch.tensor(values, dtype=torch.int32)

    prefill, computed, total = of(*[0] * SLOTS), of(*[0] * SLOTS), of(*[0] * SLOTS)
    for slot, length, done in ((5, 10, 3), (2, 6, 9), (7, 8, 6)):
        prefill[slot], computed[slot], total[slot] = length, done, max(length, done + 1)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB, (SLOTS, 32), generator=generator, dtype=torch.int32)
    return {
        "idx": torch.tensor([5, 2, 7]),
        "starts": of(0, 4, 5, 7),
        "prefill": prefill,
        "computed": computed,
        "total": total,
        "ids": ids,
        "seq_lens": of(7, 10, 8, 9, 9, 9, 9, 9),
        "cu_logits": of(0, 1, 2, 3),
        "last": torch.randint(1, VOCAB, (SLOTS, 1), generator=generator),
        "generator": generator,
    }


def test_inputs_of_a_step() -> None:
    import torch

    b = batch()
    input_ids = torch.full((16,), -1, dtype=torch.int32)
    ahead = torch.zeros(1, SLOTS, dtype=torch.int32)
    compare(
        "input_batch._prepare_prefill_inputs_kernel", (ROWS,),
        (input_ids, ahead, SLOTS, 1, b["idx"], b["starts"], b["ids"], 32, b["prefill"],
         b["computed"]),
        BLOCK_SIZE=1024, LOOKAHEAD_BLOCK=1,
    )  # fmt: skip
    compare(
        "input_batch._prepare_pos_seq_lens_kernel", (ROWS + 1,),
        (torch.full((16,), -1), torch.full((SLOTS,), 5, dtype=torch.int32), b["idx"],
         b["starts"], b["computed"], SLOTS),
        BLOCK_SIZE=1024,
    )  # fmt: skip
    compare(
        "input_batch._combine_sampled_and_draft_tokens_kernel", (ROWS,),
        (input_ids, b["idx"], b["last"], b["starts"], b["seq_lens"], b["prefill"],
         torch.zeros(SLOTS, 0, dtype=torch.int64), 0, b["cu_logits"],
         torch.zeros(ROWS, dtype=torch.int64)),
        NUM_NEW_SAMPLED_TOKENS=1, BLOCK_SIZE=1,
    )  # fmt: skip


def test_what_follows_sampling() -> None:
    import torch

    b = batch()
    num_sampled = torch.ones(ROWS, dtype=torch.int32)
    compare(
        "input_batch._get_num_sampled_and_rejected_kernel", (ROWS,),
        (num_sampled, torch.full((ROWS,), 9, dtype=torch.int32), b["seq_lens"], b["cu_logits"],
         b["idx"], b["prefill"]),
    )  # fmt: skip
    num_sampled[0] = 0
    sampled = torch.randint(1, VOCAB, (ROWS, 1), generator=b["generator"])
    compare(
        "input_batch._post_update_kernel", (ROWS,),
        (b["idx"], b["computed"], b["last"], torch.zeros(SLOTS, VOCAB, dtype=torch.int32), VOCAB,
         sampled, 1, num_sampled, torch.zeros(ROWS, dtype=torch.int32), b["starts"], b["ids"], 32,
         b["total"]),
    )  # fmt: skip


def test_block_tables_and_slot_mappings() -> None:
    import torch

    b = batch()
    sizes = torch.tensor([16, 16])
    results = []
    for runs in ("triton", "torch"):
        generator = torch.Generator().manual_seed(2)
        tables = [torch.randint(1, 99, (SLOTS, 5), generator=generator).int() for _ in range(2)]
        targets = [torch.zeros(ROWS, 5, dtype=torch.int32) for _ in range(2)]
        counts = torch.tensor([[1, 2, 3, 4, 5, 4, 3, 2], [5, 4, 3, 2, 1, 2, 3, 4]]).int()
        pointers = torch.tensor([t.data_ptr() for t in tables]).to(torch.uint64)
        outs = torch.tensor([t.data_ptr() for t in targets]).to(torch.uint64)
        strides = torch.tensor([5, 5])
        slots = torch.full((2, 12), 7)
        gather = (b["idx"], pointers, outs, strides, counts, SLOTS, ROWS)
        mapping = (
            12, b["idx"], b["starts"], torch.tensor([3, 4, 5, 6, 9, 6, 7]), pointers, strides,
            sizes, torch.tensor([True, False]), torch.tensor([False, False]), slots, 12, 0,
        )  # fmt: skip
        options = {"CP_SIZE": 1, "CP_INTERLEAVE": 1, "PAD_ID": -1, "TRITON_BLOCK_SIZE": 1024}
        if runs == "torch":
            from torch_kernels import compute_slot_mappings, gather_block_tables

            gather_block_tables(*gather, BLOCK_SIZE=1024)
            compute_slot_mappings(*mapping, **options)
        else:
            from vllm.v1.worker.gpu import block_table

            block_table._gather_block_tables_kernel[(2, ROWS)](*gather, BLOCK_SIZE=1024)
            block_table._compute_slot_mappings_kernel[(2, ROWS + 1)](*mapping, **options)
        results.append((targets, slots))
    torch.testing.assert_close(results[0], results[1])


def test_staged_writes() -> None:
    import torch

    for shape, starts in (((SLOTS,), [0, 0]), ((SLOTS, 9), [2, 0])):
        contents = torch.tensor([4, 5, 6, 7] if len(shape) == 2 else [4, 5], dtype=torch.int32)
        ends = [3, 4] if len(shape) == 2 else [1, 2]
        output = torch.zeros(shape, dtype=torch.int32)
        compare(
            "buffer_utils._apply_write_kernel", (2,),
            (output, output.stride(0), torch.tensor([6, 1]).int(), torch.tensor(starts).int(),
             contents, torch.tensor(ends).int(), None),
            BLOCK_SIZE=1024, MULTI_GROUP=False,
        )  # fmt: skip


def test_drawing_greedy_and_with_noise() -> None:
    """Both must draw the same tokens; the noise is vLLM's hash, not torch's."""
    import torch
    from torch_kernels import gumbel_sample

    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(ROWS, VOCAB, generator=generator)
    temperature = torch.zeros(SLOTS)
    temperature[2], temperature[7] = 0.8, 1.3
    seeds = torch.arange(SLOTS) * 7919 - 3
    blocks = -(-VOCAB // 1024)
    drawn = []
    for position in range(5):
        for runs in ("triton", "torch"):
            local_argmax = torch.zeros(ROWS, blocks, dtype=torch.int64)
            local_max = torch.zeros(ROWS, blocks)
            arguments = (
                local_argmax, blocks, local_max, blocks, None, 0, 0, None, None, 0, logits, VOCAB,
                torch.tensor([5, 2, 7]), seeds, torch.full((ROWS,), position), temperature, VOCAB,
            )  # fmt: skip
            options = {
                "BLOCK_SIZE": 1024, "IS_DRAFTING": False, "APPLY_TEMPERATURE": True,
                "USE_FP64": False, "PER_TOKEN_COL": False,
            }  # fmt: skip
            if runs == "torch":
                gumbel_sample(*arguments, **options)
            else:
                from vllm.v1.worker.gpu.sample import gumbel

                gumbel._gumbel_sample_kernel[(ROWS, blocks)](*arguments, **options)
            best = local_max.argmax(-1, keepdim=True)
            drawn.append(local_argmax.gather(1, best).squeeze(1).tolist())
    assert drawn[::2] == drawn[1::2]
    assert len({tuple(row) for row in drawn}) > 1, "positions draw differently"
