"""Fits a method's alignment of two views (models/alignment.py) to documents of the catalogue; before every evaluation
and every checkpoint.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from harness.core.errors import UserError
from harness.evaluate.embed import Embedder, Side
from models.alignment import Alignment
from models.batch import Batch
from models.registry import Method

RIDGE = 1e-3


@runtime_checkable
class Aligns(Protocol):
    """A method that can align its views of a document."""

    @property
    def alignment(self) -> Alignment | None:
        """Part of its towers; None: its configuration asks for none."""
        ...

    def both_views(self, batch: Batch) -> Tensor:
        """Image and title of each document, each embedded alone: [n, 2 width]."""
        ...


def wants_alignment(method: Method) -> bool:
    """True for a method whose views `align` fits."""
    return isinstance(method, Aligns) and method.alignment is not None


def documents_to_align(documents: Side, limit: int) -> Side:
    """At most `limit` of the documents that have a title, spread evenly.

    Raises:
        UserError: fewer than two have one.
    """
    titled = np.flatnonzero(documents.filled("title"))
    if len(titled) < 2:
        raise UserError(
            f"{documents.catalogue.path}: model.aligned needs documents with a title, and there are {len(titled)}",
            "Set model.aligned to false, or choose another evaluation.learn_split",
        )
    chosen = np.zeros(len(documents.ids), dtype=bool)
    chosen[titled[np.linspace(0, len(titled) - 1, min(limit, len(titled))).astype(int)]] = True
    return documents.select(chosen)


def align(method: Method, documents: Side, embedder: Embedder) -> None:
    """Fits the method's alignment; collective, and the same on every rank. The towers are left in training mode if they
    were.
    """
    assert isinstance(method, Aligns) and method.alignment is not None
    training, width = method.towers.training, 2 * len(method.alignment.correlation)
    method.towers.eval()
    try:
        # Damaged photos have weight 0.
        vectors, _ = embedder.apply(
            method, documents, lambda b: torch.cat([method.both_views(b), b.document_weights[:, None]], 1), width + 1
        )
    finally:
        method.towers.train(training)
    vectors, weights = vectors[:, :width].double(), vectors[:, width].double()
    moments = torch.cat([weights.sum()[None], weights @ vectors, (vectors.T * weights @ vectors).flatten()])
    dist.all_reduce(moments, group=embedder.mesh.dp)
    count, total, products = moments.split([1, width, width * width])
    method.alignment.fit(count[0], total, products.view(width, width), RIDGE)
    for fitted in method.alignment.parameters():  # on two GPUs the same decomposition need not give the same bits
        dist.broadcast(fitted.data, 0)
