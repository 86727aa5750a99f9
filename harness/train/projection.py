"""Start of the layers behind an imported image tower: train.init_projection."""

from __future__ import annotations

import math

import torch

from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.core.progress import progress
from harness.data.loader import StepLoader
from harness.evaluate.calibration import fit_to
from models.method import Method

IMAGES_PER_CHANNEL = 4  # below 1 some directions are not determined


@torch.no_grad()
def start_at_principal(method: Method, loader: StepLoader, mesh: Mesh) -> str:
    """Sets the method's projection by the images of the first steps, as training sees them; collective, and the same on
    every rank, on any number of ranks. The towers are left in the mode that they were in.

    Returns:
        a line for the log.

    Raises:
        UserError: the method has no such layers, or its embedding is wider than the image tower's vector.
    """
    fit, training = method.projection, method.towers.training
    if fit is None:
        raise UserError("train.init_projection is principal, but this method has no layers that can start so")
    if method.config.embedding_dim > fit.width:
        raise UserError(
            f"train.init_projection principal finds at most {fit.width:,} directions, the width of the image tower's "
            f"vector, and model.embedding_dim is {method.config.embedding_dim:,}",
            f"Set model.embedding_dim to {fit.width} or less",
        )
    dtype = next(method.towers.parameters()).dtype
    steps = math.ceil(IMAGES_PER_CHANNEL * fit.width / sum(loader.samples(0)))
    vectors, weights = [], []
    method.towers.eval()
    bar = progress("projection", steps, 0, " steps") if mesh.rank == 0 else None
    try:
        for data in loader.steps(0, steps):
            for batch in data.batches:
                there = batch.to(mesh.device, dtype)
                vectors.append(fit.vectors(there).float())
                weights.append(torch.cat([there.query_weights, there.document_weights]))
            if bar is not None:
                bar.update()
    finally:
        method.towers.train(training)
        if bar is not None:
            bar.close()
    fit_to(fit, torch.cat(vectors), torch.cat(weights), mesh)
    return f"projection at {method.config.embedding_dim:,} principal directions of the images of {steps:,} steps"
