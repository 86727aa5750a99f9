"""Rows and objects gathered from ranks that hold unequally many, also none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from harness.core.waiting import gather_objects
from models.comm import gather_shards, gather_to_first, share
from tests.pool import ranks


def gathered(sizes: list[int]) -> list[Any]:
    """In a pool: a rank's rows are (its number, row); what each way of gathering gives here."""
    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    rows = torch.tensor([[rank, row] for row in range(sizes[rank])], dtype=torch.int64).reshape(-1, 2)
    everywhere = [gather_shards(rows, group), gather_shards(rows, group, sizes)]
    return [
        gather_objects((rank, sizes[rank])),
        gather_to_first(rows, group).tolist(),
        *(x.tolist() for x in everywhere),
    ]


@pytest.mark.parametrize("sizes", [[3, 0, 1], [1, 1, 1], [0, 0, 0]])
def test_rows_and_objects_are_gathered_in_rank_order(sizes: list[int]) -> None:
    rows = [[rank, row] for rank, size in enumerate(sizes) for row in range(size)]
    for rank, (objects, first, *everywhere) in enumerate(ranks(3).run(gathered, sizes)):
        assert objects == list(enumerate(sizes)) and everywhere == [rows, rows]
        assert first == (rows if rank == 0 else [])


def test_shares_are_consecutive_and_nearly_equal() -> None:
    for total in range(12):
        for parts in range(1, 6):
            shares = [share(total, parts, part) for part in range(parts)]
            assert [x for one in shares for x in one] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
