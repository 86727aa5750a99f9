"""Updates of rows in every setting, for the tests of the Triton kernel: in the interpreter and on a GPU. Needs torch
alone.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from models.heads.row_optimizer import RowAdamW, RowOptimizerConfig

SETTINGS = [  # type of the rows, bf16_rows, state, weight_decay, betas
    *(
        (dtype, bf16_rows, state, decay, (0.9, 0.999))
        for dtype, bf16_rows in [(torch.float32, "master"), (torch.bfloat16, "master"), (torch.bfloat16, "stochastic")]
        for state, decay in itertools.product(("fp32", "8bit"), (0.0, 0.1))
    ),
    (torch.float32, "master", "fp32", 0.1, (0.3, 0.98)),
    (torch.float32, "master", "8bit", 0.1, (0.0, 0.98)),
]


def updated(d: int, setting: tuple[Any, ...], device: str = "cpu") -> dict[str, Tensor]:
    """Rows and state after five updates, on the CPU: of an odd number of rows, one, none, all; by gradients of every
    size and of zeros.
    """
    dtype, bf16_rows, state, decay, betas = setting
    n, g = 15, torch.Generator().manual_seed(d)
    rows = (0.05 * torch.randn(n, d, generator=g)).to(device, dtype)
    options = RowOptimizerConfig(state=state, bf16_rows=bf16_rows, weight_decay=decay, betas=betas)
    optimizer = RowAdamW(rows, options, first_class=2**33 + 5, seed=2**62 + 77)
    for step, some in enumerate(([0, 1, 4, 5, 7, 11, 14], [7], [], range(n), [0, 3, 7])):
        active = torch.tensor(some, dtype=torch.int64)
        grad = torch.randn(len(active), d, generator=g)
        grad *= torch.tensor([0, 1e-38, 1e-19, 1e18, 1e-3, 1])[(active + step) % 6, None]
        optimizer.catch_up(active.to(device))
        optimizer.step(active.to(device), grad.to(device), 1e-3 * (step + 1))
    return {name: value.cpu() for name, value in {"rows": rows, **optimizer.row_state()}.items()}
