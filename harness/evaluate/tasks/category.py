"""Category prediction: what frozen embeddings tell of a document's category, by a linear probe and by nearest
neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from harness.core.errors import UserError
from harness.core.keyed_random import Stream, keyed_hash
from harness.core.waiting import on_first_rank
from harness.evaluate.embed import Side
from harness.evaluate.ranking import Embedded
from harness.evaluate.tasks.task import CommonConfig, Found, Gallery, Task, TaskInputs
from models.comm import gather_to_first
from models.method import Method
from models.ranges import AtLeastTwo

NEIGHBOURS = 10
ROUNDS = 2000  # of the probe's solver at most
_CHOICE = Stream.PROBE_SAMPLE


@dataclass(frozen=True, kw_only=True)
class CategoryTaskConfig(CommonConfig):
    """Keys of the task category.

    Args:
        probe_documents: at most so many documents teach, and at most so many are asked, chosen by their ids: one rank
            holds them.
    """

    probe_documents: AtLeastTwo = 200_000


class CategoryTask(Task):
    """Documents of one split teach the categories, those of the evaluation are asked; scikit-learn on the first rank,
    the others wait as long.

    Documents that are asked may not teach; those of a category that no document teaches count as wrong.
    """

    name = "category"
    config = CategoryTaskConfig
    attributes = ("category",)

    def __init__(self, inputs: TaskInputs) -> None:
        config: CategoryTaskConfig = inputs.config
        documents, category, limit = inputs.documents, config.category, config.probe_documents
        learned = inputs.side("document", config.learn_split)
        if config.learn_split != config.split:  # documents of split 'all' are asked, so they may not teach
            learned = learned.select(~np.isin(learned.ids, documents.ids))
        teaching = learned.columns[category].used()
        if len(teaching) < 2:
            raise UserError(
                f"evaluation.category '{category}' has fewer than two values to learn in {learned.catalogue.path}",
                "Choose another attribute, or another evaluation.learn_split",
            )
        if not documents.columns[category].filled().any():
            raise UserError(
                f"no document of {documents.catalogue.path} that is asked has a value of evaluation.category "
                f"'{category}'",
                "Choose another attribute, or another evaluation.split",
            )
        if len(some := chosen(learned, category, limit)) < learned.columns[category].filled().sum():
            learned = learned.select(np.isin(np.arange(len(learned.ids)), some))  # the others need not be embedded
        self.learned, self.documents, self.category, self.limit = learned, documents, category, limit
        self.embedder, self.mesh = inputs.embedder, inputs.mesh
        self.names = sorted({*teaching, *documents.columns[category].used()})

    @staticmethod
    def errors(config: CategoryTaskConfig) -> list[str]:
        """See Task."""
        empty = "evaluation.category is empty: the task category predicts an attribute"
        return [] if config.category else [empty]

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """See Task."""
        learned = self._table(self.learned, self.embedder.embed(method, self.learned, seen))
        asked = self._table(self.documents, gallery.own(seen))
        return Found(on_first_rank(lambda: predicted(*learned, *asked), self.mesh, "fitting the probe"))

    def _table(self, side: Side, own: Embedded) -> tuple[np.ndarray, np.ndarray]:
        """On the first rank vectors, float64, and numbers of the categories of all ranks' documents that are looked at;
        collective.
        """
        rows = chosen(side, self.category, self.limit)
        rows = rows[~self.embedder.missing(side)[rows]]
        mine = torch.isin(own.ids, torch.from_numpy(side.ids[rows]).to(own.ids.device))
        vectors = gather_to_first(own.vectors[mine], self.mesh.dp)
        return vectors.double().cpu().numpy(), side.columns[self.category].take(rows).in_list(self.names)


def chosen(side: Side, category: str, limit: int) -> np.ndarray:
    """Rows of at most `limit` documents that have a category, int64 ascending: a function of their ids alone."""
    rows = np.flatnonzero(side.columns[category].filled())
    if len(rows) > limit:
        rows = np.sort(rows[np.argpartition(keyed_hash(0, _CHOICE, side.ids[rows]), limit)[:limit]])
    return rows


def predicted(x: np.ndarray, y: np.ndarray, asked: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1 of a logistic regression on standardised features and of the 10 nearest by cosine, the
    nearer weighing more.

    Args:
        x: [n, d] unit vectors that teach.
        y: [n] their categories, or numbers that sort as these do.
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
