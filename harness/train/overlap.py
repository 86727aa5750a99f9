"""Overlap of the gradient reduction with backward, for losses that do not use every parameter."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn


class OverlappedReduction:
    """Starts megatron-core's reductions in one order on every rank, and lets parameters without a gradient pass.

    megatron-core 0.16 starts the reduction of a bucket group as soon as all its parameters have a gradient, and ends
    the run in the second step if a parameter got none in the first: a head whose weight is 0, the text tower of a model
    that sees only images. Here a group does not wait for those parameters. A group that is late on some rank (one
    without samples, say) delays the groups behind it there, because NCCL pairs the collectives of ranks by their order.
    Source: ours; the fixed order is that of torch's DistributedDataParallel (Li et al. 2020).

    Args:
        groups: the bucket groups of a megatron-core DistributedDataParallel with overlap_grad_reduce.
        names: parameter -> its name, for the error.
    """

    def __init__(self, groups: list[Any], names: dict[nn.Parameter, str]) -> None:
        self.groups, self.names = groups, names
        self._starts = [group.start_grad_sync for group in groups]
        self._params = [set(group.params) for group in groups]
        self._ready: set[int] = set()
        self._next, self._first_step = 0, True
        for number, group in enumerate(groups):
            group.start_grad_sync = partial(self._start, number)

    def _start(self, number: int, force_all_reduce: bool = False) -> None:
        """Starts all reductions whose turn it is. Called by megatron-core when a group is ready, and in the first step
        once more after backward.
        """
        self._ready.add(number)
        # A group without any gradient is ready at all times.
        while self._next < len(self.groups) and (self._next in self._ready or not self.groups[self._next].params):
            self._starts[self._next](force_all_reduce=force_all_reduce)
            self._next += 1

    def finish(self) -> None:
        """Starts the remaining reductions; to be called after backward and before megatron-core's finish_grad_sync.

        Raises:
            RuntimeError: a parameter without a gradient in the first step has one now, after its group's reduction.
        """
        for number, group in enumerate(self.groups):
            got = group.per_param_grad_ready_counts.keys()
            if self._first_step:
                group.params &= got
            elif late := got - group.golden_per_param_grad_ready_counts.keys():
                raise RuntimeError(
                    f"{', '.join(sorted(self.names[p] for p in late))}: a gradient in this step, none in the first "
                    "since the start, so that its reduction may have been missed. Set optimizer.overlap to never"
                )
            self._start(number)
        self._first_step = False

    def restart(self) -> None:
        """Learns again, in the next step, which parameters get a gradient."""
        for group, params in zip(self.groups, self._params, strict=True):
            group.params, group.is_first_batch = set(params), True
            group.golden_per_param_grad_ready_counts, group.per_param_grad_ready_counts = {}, {}
        self._first_step = True

    def begin(self) -> None:
        """Forgets the last step's reductions; to be called before backward."""
        self._ready.clear()
        self._next = 0
