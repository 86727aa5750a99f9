"""Gradient caching: a loss over all micro-batches of a step at once, in the memory of one (Gao et al., arXiv
2101.06983).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Sample = TypeVar("Sample")
Rest = TypeVar("Rest")


def cached_losses(
    encode: Callable[[Sample], tuple[tuple[Tensor, ...], Rest]],
    batches: Sequence[Sample],
    loss_of: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    parameters: Sequence[Tensor] = (),
) -> Iterator[tuple[Tensor, dict[str, Tensor], Rest]]:
    """Yields one loss per micro-batch; call backward on each before asking for the next. Their gradients add up to that
    of the loss over all.

    All micro-batches are encoded without a graph, the loss of all embeddings gives the gradient of each, and a second,
    equal forward of a micro-batch carries its part into the weights: one forward more, exact also with dropout, whose
    random streams are rewound. A single micro-batch is encoded once.

    Args:
        encode: a micro-batch to (embeddings, each [n, ...], and anything else, which is handed on with its graph).
        batches: the micro-batches of this rank; every rank has as many, of any size.
        loss_of: (embeddings of all micro-batches, each [sum of n, ...]) -> (loss, metrics that add up); may be
            collective.
        parameters: other parameters of `loss_of`, such as a log scale.

    Yields:
        (loss, metrics, other results of encode) of a micro-batch, an equal part of the whole: over the micro-batches
        losses and metrics add up to those of the whole.
    """
    if len(batches) == 1:
        embeddings, rest = encode(batches[0])
        yield *loss_of(*embeddings), rest
        return
    streams, encoded = [], []
    with torch.no_grad():
        for batch in batches:
            streams.append(_Streams.now())
            encoded.append(encode(batch)[0])
    leaves = [torch.cat(pieces).requires_grad_() for pieces in zip(*encoded, strict=True)]
    loss, metrics = loss_of(*leaves)
    grads = torch.autograd.grad(loss, [*leaves, *parameters])
    lengths = [list(map(len, pieces)) for pieces in zip(*encoded, strict=True)]
    grad_pieces = zip(*(g.split(n) for g, n in zip(grads, lengths, strict=False)), strict=True)
    part = 1 / len(batches)
    for batch, stream, pieces in zip(batches, streams, grad_pieces, strict=True):
        stream.rewind()
        embeddings, rest = encode(batch)
        # Its gradient is the cached one; the parameters' is dealt out, so that every backward reaches the same weights.
        carrier = sum((x * g).sum() for x, g in zip(embeddings, pieces, strict=True))
        carrier = carrier + part * sum((p * g).sum() for p, g in zip(parameters, grads[len(leaves) :], strict=True))
        value = part * loss.detach()
        yield value + (carrier - carrier.detach()), {name: part * x for name, x in metrics.items()}, rest


@dataclass(frozen=True)
class _Streams:
    """Random streams of this process: torch's on the CPU and the current GPU, and megatron-core's tracked ones."""

    cpu: Tensor
    cuda: Tensor | None
    tracked: dict[str, Tensor]

    @staticmethod
    def now() -> _Streams:
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return _Streams(torch.get_rng_state(), cuda, _tracker().get_states() if _tracker() else {})

    def rewind(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        if self.tracked:
            _tracker().set_states(self.tracked)


def _tracker() -> Any:
    """megatron-core's tracker of random streams; None in a process that has not imported megatron-core."""
    random = sys.modules.get("megatron.core.tensor_parallel.random")
    return random.get_cuda_rng_tracker() if random else None
