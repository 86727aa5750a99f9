"""Random streams: the same wherever tensor-parallel ranks must agree, different everywhere else, and never saved."""

from __future__ import annotations

import pytest
import torch

from harness.errors import UserError
from harness.mesh import MeshConfig, check_layout
from tests.pool import layout, ranks


def streams(step: int) -> tuple[int, int, tuple[float, ...], tuple[float, ...]]:
    from megatron.core import tensor_parallel

    with layout(2) as mesh:
        mesh.seed_streams(seed=5, step=step)
        plain = torch.rand(3)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            tracked = torch.rand(3)
        return mesh.dp.rank(), mesh.tp.rank(), tuple(plain.tolist()), tuple(tracked.tolist())


def test_streams_of_a_step() -> None:
    first, again, other = (ranks(4).run(streams, step) for step in (3, 3, 4))
    assert first == again, "a stream depends on something else than seed, step and place"
    plain = {(dp, tp): values for dp, tp, values, _ in first}
    assert plain[0, 0] == plain[0, 1] and plain[1, 0] == plain[1, 1] and plain[0, 0] != plain[1, 0]
    tracked = [values for _, _, _, values in first]
    assert len(set(tracked)) == 4, "two ranks drop the same activations inside a tensor-parallel region"
    everything = [values for found in (first, other) for _, _, *pair in found for values in pair]
    assert len(set(everything)) == 2 * (2 + 4), "two steps, or two streams, draw the same"


def test_a_layout_that_does_not_divide() -> None:
    with pytest.raises(UserError, match=r"tensor_parallel is 3, but 4 rank"):
        check_layout(MeshConfig(tensor_parallel=3), 4)
