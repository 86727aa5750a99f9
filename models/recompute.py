"""Activation recomputation: less memory for one more forward pass of the recomputed parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models import megatron_cpu

megatron_cpu.install()

from megatron.core import tensor_parallel  # noqa: E402


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Calls function(*inputs), keeps only its inputs and runs it again in backward with the same random numbers.

    megatron-core's own checkpointing runs a nested backward: a tower used twice in one graph then reports each gradient
    twice, and the overlapped reduction starts at the first. This one stays in the graph. Source:
    torch.utils.checkpoint; Chen et al. 2016.
    """
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=_tracked_streams)


def _tracked_streams() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of the first and second run. They restore megatron-core's tracked streams; torch restores its own."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    first = tracker.get_states()

    @contextmanager
    def again() -> Iterator[None]:
        now = tracker.get_states()
        tracker.set_states(first)
        try:
            yield
        finally:
            tracker.set_states(now)

    return nullcontext(), again()
