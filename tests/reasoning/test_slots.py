"""Rows of the slots: how they are taken and written."""

import pytest
import torch

from coconut_serve.reasoning.slots import index_of

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    "members", [[], [0], [4], [1, 2, 3], [0, 1, 2, 3, 4], [0, 2], [3, 1], [0, 2, 1, 3]]
)
def test_index_takes_and_writes_the_members(members: list[int]) -> None:
    rows = torch.arange(5.0)
    index = index_of(members, rows.device)
    assert rows[index].tolist() == members
    rows[index] = -1.0
    assert [i for i, value in enumerate(rows.tolist()) if value < 0] == sorted(members)


def test_neighbours_are_not_copied() -> None:
    rows = torch.arange(5.0)
    assert rows[index_of([1, 2], rows.device)].data_ptr() == rows[1:].data_ptr()
