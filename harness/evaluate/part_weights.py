"""Weights of the parts of a document's vector, chosen after training by what finds the right documents. Ours."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch.nn.functional as F
from torch import Tensor

from harness.core.errors import UserError
from harness.evaluate.evaluation import Evaluation
from harness.evaluate.ranking import Embedded
from harness.evaluate.tasks.photo import PhotoTask
from models.batch import Batch
from models.method import Method

PHOTOS = 1000  # that choose
GRID = (0.0, 0.25, 0.5, 1.0, 2.0)  # of the parts behind the first, beside a first part of 1 or 0


@dataclass(frozen=True)
class Choice:
    """Weights by part, and the mean of Recall@1 over all products and over those never trained on (where there are
    any), with the weights of training and with these.
    """

    weights: dict[str, float]
    before: float
    after: float

    def __str__(self) -> str:
        told = ", ".join(f"{name} {weight:g}" for name, weight in self.weights.items())
        return f"weights of a document's parts: {told}; recall@1 {self.before:.3f} before, {self.after:.3f} with them"


def weigh_parts(evaluation: Evaluation, method: Method) -> Choice:
    """Sets the weights of the method's parts to those of the grid, or of training, that find most; the first of equals,
    training's before all.

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

    def recall(weights: tuple[float, ...]) -> float:
        summed = (parts * parts.new_tensor(weights)[:, None]).sum(1)
        _, figures, rows = task.measure(queries, Embedded(F.normalize(summed, dim=-1), whole.ids, whole.labels))
        new = [row["recall_at_1"] for row in rows if (row["slice"], row["value"]) == ("class", "never trained")]
        values = [figures["recall_at_1"], *new]
        return sum(values) / len(values)

    found = {kept: recall(kept)}
    for weights in product((1.0, 0.0), *[GRID] * (count - 1)):
        if any(weights):
            found.setdefault(weights, recall(weights))
    best = max(found, key=lambda weights: found[weights])
    method.weigh_parts(best)
    return Choice(dict(zip(method.parts, best, strict=True)), found[kept], found[best])
