"""The pool itself: results in rank order, layouts, and a failing rank that fails the test."""

import pytest
import torch
import torch.distributed as dist

from tests.pool import layout, ranks


def place(tensor_parallel: int) -> tuple[int, int, int]:
    with layout(tensor_parallel) as mesh:
        total = mesh.sum(torch.tensor(float(mesh.rank)))
        return mesh.dp.rank(), mesh.tp.rank(), int(total)


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("on purpose")


def test_layouts_and_failures() -> None:
    assert ranks(4).run(place, 2) == [(0, 0, 6), (0, 1, 6), (1, 0, 6), (1, 1, 6)]
    assert ranks(3).run(place, 1) == [(0, 0, 3), (1, 0, 3), (2, 0, 3)]
    with pytest.raises(AssertionError, match=r"rank 1 of 3:(.|\n)*on purpose"):
        ranks(3).run(fail_on_one)
    assert ranks(2).run(place, 2) == [(0, 0, 1), (0, 1, 1)]
