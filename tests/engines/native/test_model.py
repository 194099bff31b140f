"""The paged model on packed layers: steps of few rows are padded, and nobody sees it."""

from pathlib import Path

import pytest
import torch

from coconut_serve.engines.native.attention import AttentionPlan
from coconut_serve.engines.native.linear import MIN_ROWS, PackedTable, can_pack
from coconut_serve.engines.native.model import PagedModel

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not can_pack(torch.float32), reason="linears cannot be packed here"),
]


def load(directory: Path, *, is_packed: bool) -> PagedModel:
    cpu = torch.device("cpu")
    return PagedModel.load(directory, dtype=torch.float32, device=cpu, is_packed=is_packed)


@torch.inference_mode()
def first_step(model: PagedModel, num_rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of the first position of some sequences, and the caches after it."""
    caches = model.make_caches(2 * num_rows)
    for tensor in (tensor for pair in caches for tensor in pair):
        tensor.zero_()  # so that what is written shows
    at = torch.arange(num_rows, 2 * num_rows)
    plan = AttentionPlan(
        write_slots=at,
        num_decode=num_rows,
        decode_slots=at.unsqueeze(1),
        decode_lengths=torch.ones(num_rows, dtype=torch.int64),
        chunks=[],
        caches=caches,
    )
    inputs = model.embed_tokens(torch.arange(3, 3 + num_rows))
    hidden = model.forward(inputs, torch.zeros(num_rows, dtype=torch.int64), plan)
    return model.project_logits(hidden), [tensor for pair in caches for tensor in pair]


@pytest.mark.parametrize("num_rows", range(1, MIN_ROWS + 2))
def test_few_rows_give_what_plain_layers_give(tiny_llama: Path, num_rows: int) -> None:
    logits, caches = first_step(load(tiny_llama, is_packed=True), num_rows)
    expected, written = first_step(load(tiny_llama, is_packed=False), num_rows)
    assert logits.shape[0] == num_rows
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(caches, written)
    for cache in caches:  # what pads is not written
        assert not cache[:num_rows].any()
        assert cache[num_rows:].flatten(1).any(1).all()


@torch.inference_mode()
def test_a_row_alone_is_the_row_among_a_few(tiny_llama: Path) -> None:
    """To the last bit: both go through one kernel."""
    model = load(tiny_llama, is_packed=True)
    alone, _ = first_step(model, 1)
    among, _ = first_step(model, MIN_ROWS)
    assert torch.equal(alone[0], among[0])


@pytest.mark.parametrize("num_rows", [1, MIN_ROWS, MIN_ROWS + 2])
def test_packed_table_multiplies(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 24, generator=generator)
    weights = torch.rand(num_rows, 40, generator=generator)
    torch.testing.assert_close(PackedTable(table)(weights), weights @ table)
