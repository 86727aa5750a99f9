"""Fits a method's calibration (models.method.Calibration) to documents of the catalogue; before every evaluation and
every checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from harness.core.errors import UserError
from harness.core.evenly import evenly
from harness.core.mesh import Mesh
from harness.evaluate.embed import Embedder, Side
from harness.evaluate.tasks.task import CommonConfig
from models.method import Calibration, Fit, Method
from models.ranges import AtLeastTwo


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(CommonConfig):
    """Keys of calibration.

    Args:
        align_documents: at most so many documents of learn_split that a method's calibration is fitted to.
    """

    align_documents: AtLeastTwo = 8192


def documents_to_fit(calibration: Calibration, documents: Side, limit: int) -> Side:
    """At most `limit` of the documents that have the text which the calibration needs, spread evenly.

    Raises:
        UserError: fewer than two have one.
    """
    filled = np.flatnonzero(documents.filled(calibration.needs))
    if len(filled) < 2:
        key = f"model.{calibration.key}"
        raise UserError(
            f"{documents.catalogue.path}: {key} needs documents with a {calibration.needs}, "
            f"and there are {len(filled)}",
            f"Set {key} to false, or choose another evaluation.learn_split",
        )
    chosen = np.zeros(len(documents.ids), dtype=bool)
    chosen[filled[evenly(len(filled), limit)]] = True
    return documents.select(chosen)


def calibrate(method: Method, documents: Side, embedder: Embedder) -> None:
    """Fits the method's calibration, which it has; collective, and the same on every rank. The towers are left in
    training mode if they were.
    """
    calibration, training = method.calibration, method.towers.training
    assert calibration is not None, "the caller asks"
    vectors_of, width = calibration.vectors, calibration.width
    method.towers.eval()
    try:
        # Damaged photos have weight 0.
        vectors, _ = embedder.apply(
            method, documents, lambda b: torch.cat([vectors_of(b), b.document_weights[:, None]], 1), width + 1
        )
    finally:
        method.towers.train(training)
    fit_to(calibration, vectors[:, :width], vectors[:, width], embedder.mesh)


def fit_to(fit: Fit, vectors: Tensor, weights: Tensor, mesh: Mesh) -> None:
    """Fits to this rank's vectors [n, width], weighted by [n], and those of the other ranks of its dp; collective, and
    the same on every rank.
    """
    vectors, weights, width = vectors.double(), weights.double(), fit.width
    moments = torch.cat([weights.sum()[None], weights @ vectors, (vectors.T * weights @ vectors).flatten()])
    dist.all_reduce(moments, group=mesh.dp)
    count, total, products = moments.split([1, width, width * width])
    fit.fit(count[0], total, products.view(width, width))
    for fitted in fit.module.parameters():  # on two GPUs the same decomposition need not give the same bits
        dist.broadcast(fitted.data, 0)
