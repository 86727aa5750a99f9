"""Category prediction: what frozen embeddings tell of a document's category, by a linear probe and by nearest neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch.distributed as dist

from harness.embed import Embedder, Side
from harness.errors import UserError
from harness.mesh import Mesh
from harness.methods import Method
from harness.retrieval import Embedded
from harness.tasks import Found, Gallery, gathered

NEIGHBOURS = 10
ROUNDS = 2000  # of the probe's solver at most


class CategoryTask:
    """Documents of one split teach the categories, those of the evaluation are asked; scikit-learn on the first rank.

    Args:
        learned: documents that teach, of another split.
        documents: documents that are asked; those of a category that `learned` does not show count as wrong.
        category: the attribute.
        embedder: embeds them.
        mesh: the ranks.
    """

    name = "category"

    def __init__(self, learned: Side, documents: Side, category: str, embedder: Embedder, mesh: Mesh) -> None:
        self.learned, self.documents, self.category = learned, documents, category
        self.embedder, self.mesh = embedder, mesh
        if len({value for value in learned.columns[category] if value}) < 2:
            raise UserError(
                f"evaluation.category '{category}' has fewer than two values to learn in {learned.catalogue.path}",
                "Choose another attribute, or another evaluation.learn_split",
            )
        if not any(documents.columns[category]):
            raise UserError(
                f"no document of {documents.catalogue.path} that is asked has a value of evaluation.category '{category}'",
                "Choose another attribute, or another evaluation.split",
            )

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """See harness.tasks.Task."""
        sides = (self.learned, self.embedder.embed(method, self.learned, seen)), (self.documents, gallery.own(seen))
        (x, y), (asked, truth) = (self._table(side, vectors) for side, vectors in sides)
        figures: list[Any] = [predicted(x, y, asked, truth) if self.mesh.rank == 0 else None]
        dist.broadcast_object_list(figures)
        return Found(figures[0])

    def _table(self, side: Side, own: Embedded) -> tuple[np.ndarray, np.ndarray]:
        """Vectors and categories of all ranks' documents that have one; collective."""
        rows = gathered(list(zip(own.ids.tolist(), own.vectors.tolist(), strict=True)), self.mesh)
        values = np.array([value or "" for value in side.columns[self.category]])
        return np.array([vector for _, vector in rows])[values != ""], values[values != ""]


def predicted(x: np.ndarray, y: np.ndarray, asked: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1 of a logistic regression on standardised features and of the 10 nearest by cosine, the nearer weighing more.

    Args:
        x: [n, d] unit vectors that teach.
        y: [n] their categories.
        asked: [m, d].
        truth: [m].
    """
    from sklearn.linear_model import LogisticRegression  # here: it takes a second to load
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=ROUNDS))
    nearest = KNeighborsClassifier(min(NEIGHBOURS, len(x)), metric="cosine", weights="distance")
    figures = {"queries": float(len(truth)), "documents": float(len(y))}
    for prefix, model in (("", probe), ("knn_", nearest)):
        figures |= scores(truth, model.fit(x, y).predict(asked), prefix)
    return figures


def scores(truth: np.ndarray, said: np.ndarray, prefix: str = "") -> dict[str, float]:
    """Accuracy and macro-F1 over the categories [m] that there are, of those that were said [m]."""
    from sklearn.metrics import accuracy_score, f1_score

    macro = f1_score(truth, said, average="macro", labels=np.unique(truth), zero_division=0)
    return {f"{prefix}accuracy": float(accuracy_score(truth, said)), f"{prefix}macro_f1": float(macro)}
