"""Weights of the parts of a document's vector, chosen after training by what finds the right documents. Ours."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from harness.core.errors import UserError
from harness.evaluate.evaluation import Evaluation
from harness.evaluate.ranking import Embedded, RelevantRanks
from harness.evaluate.tasks.photo import PhotoTask, never_trained
from models.batch import Batch
from models.method import Method

PHOTOS = 1000  # that choose
GRID = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the parts behind the first, beside a first part of 1 or 0


Weights = tuple[float, ...]


@dataclass(frozen=True)
class Choice:
    """Weights by part, and the mean of Recall@1 over all products and over those never trained on (where there are
    any), with the weights of training, with these, and with the best of all.
    """

    weights: dict[str, float]
    before: float
    after: float
    best: float

    def __str__(self) -> str:
        told = ", ".join(f"{name} {weight:g}" for name, weight in self.weights.items())
        figures = f"recall@1 {self.before:.3f} before, {self.after:.3f} with them"
        return f"weights of a document's parts: {told}; {figures}, {self.best:.3f} with the best"


def choose(found: dict[Weights, np.ndarray], counts: np.ndarray) -> Weights:
    """The weights with the largest share of the first part among those that find as many as the best, within one
    standard error of the difference (Breiman et al., Classification and Regression Trees, 1984); of these the best.

    A few photos that choose would else prefer by chance weights that find less elsewhere.

    Args:
        found: weights -> bool [n], whether each photo found a right document first.
        counts: float64 [n], what each photo adds to the figure.
    """
    figure = {weights: float(counts @ hits) for weights, hits in found.items()}
    best = max(figure, key=lambda weights: figure[weights])

    def as_good(weights: Weights) -> bool:
        lead = counts * (found[best].astype(float) - found[weights])
        return float(lead.sum()) <= float(np.sqrt((lead**2).sum())) * (1 + 1e-9)  # equal, however a CPU rounds

    return max(
        (weights for weights in found if as_good(weights)),
        key=lambda weights: (weights[0] / sum(weights), figure[weights]),
    )


def weigh_parts(evaluation: Evaluation, method: Method) -> Choice:
    """Sets the weights of the method's parts to those of the grid, or of training, that `choose` takes.

    Compares the photos and documents that baselines are computed on (evaluation.baselines), the documents' parts
    embedded once. The same on every rank; collective.

    Args:
        evaluation: with the task photo.
        method: has part_weights.

    Raises:
        UserError: the split has no photo with a right document.
    """
    tasks = [task for task in evaluation.tasks if isinstance(task, PhotoTask)]
    if not tasks or (sample := tasks[0].sample) is None:
        raise UserError(
            f"Split '{evaluation.config.split}' of {evaluation.catalogue.path} has no photo to choose weights by",
            "Leave out --weigh-parts",
        )
    (task, *_), embedder = tasks, evaluation.embedder
    count, width = len(method.parts), embedder.model.embedding_dim

    def units(batch: Batch) -> Tensor:
        return F.normalize(method.explain_document(batch).parts.float(), dim=-1).flatten(1)

    kept = method.part_weights
    method.weigh_parts([1.0] * count)  # a part of weight 0 has no direction
    queries = sample.asked(method, embedder)
    whole = embedder.embed_by(method, sample.documents, units, count * width)
    parts = whole.vectors.unflatten(1, (count, width))

    def ranks_by(weights: Weights) -> RelevantRanks:
        summed = (parts * parts.new_tensor(weights)[:, None]).sum(1)
        return task.measure(queries, Embedded(F.normalize(summed, dim=-1), whole.ids, whole.labels))[0]

    trained = ranks_by(kept)
    counts = _counts(trained.first >= 0, never_trained(task, trained))
    found = {kept: trained.first == 0}
    for weights in product((1.0, 0.0), *[GRID] * (count - 1)):
        if any(weights) and weights not in found:
            found[weights] = ranks_by(weights).first == 0
    chosen = choose(found, counts)
    method.weigh_parts(chosen)
    figure = {weights: float(counts @ hits) for weights, hits in found.items()}
    return Choice(dict(zip(method.parts, chosen, strict=True)), figure[kept], figure[chosen], max(figure.values()))


def _counts(answered: np.ndarray, new: np.ndarray) -> np.ndarray:
    """What each photo adds to the mean of Recall@1 over all photos that have a right document and over the new ones."""
    groups = [group / group.sum() for group in (answered * 1.0, answered & new) if group.any()]
    return sum(groups, np.zeros(len(answered))) / max(len(groups), 1)
