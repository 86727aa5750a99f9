"""torch.compile as the towers use it: whole graphs, one for any number of samples and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

# Graphs of one function: towers x (training or not) x (mask or none) x (first layer or later, frozen or not); torch's
# own limit is 8.
GRAPHS = 64

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function, backend: str) -> Function:
    """`function` compiled by torch.compile's `backend` at its first call; itself where that is empty.

    A graph break is an error. Sizes are constants of the graph, except those marked by `may_vary`: a longer text does
    not recompile anything.
    """
    if not backend:
        return function
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)  # type: ignore[return-value]


def may_vary(x: Tensor | None, *dims: int) -> None:
    """Marks sizes of a compiled function's argument that differ between calls. A size of 1 stays a constant: it may
    mean a broadcast.
    """
    if x is not None:
        for dim in dims:
            if x.shape[dim] > 1:
                torch._dynamo.maybe_mark_dynamic(x, dim)
