"""Interface of an evaluation task, and what tasks share.

A task is prepared once, where it refuses what it cannot use, and run at any step. Documents are embedded once for all
tasks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.core.waiting import gather_objects
from harness.evaluate.baselines import Sample
from harness.evaluate.coded import Coded
from harness.evaluate.embed import ClassKeys, Embedder, Side
from harness.evaluate.failures import Failures
from harness.evaluate.ranking import Embedded, RelevantRanks
from models.method import Method
from models.ranges import NonNegativeInt, PositiveInt

SHOWN = 5  # documents in a row of the panel

Row = TypeVar("Row")
# A query (a sample id, or a text), its best documents, and whether each is relevant.
Shown = tuple[int | str, list[int], list[bool]]


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Keys of evaluation that several tasks read.

    Args:
        split: split of the queries (and of documents that are not in every split).
        batch_size: images embedded at once.
        tasks: tasks of an evaluation (harness/evaluate/tasks); none names the method's usual one. Figures of the first
            keep plain names.
        final_tasks: further tasks once training has ended.
        views: what is seen of documents: both, title, image; more than one is a modality drop.
        category: attribute that the task category predicts, and by whose values modal weights are reported.
        learn_split: split of the documents that something is learned from; those that are also in `split` do not teach.
        slices: attribute columns of the catalogue whose values get figures of their own.
        distractors: other catalogues whose documents join the gallery, relevant to nothing.
        panel: queries shown with their best documents in TensorBoard.
        projector: at most so many of the catalogue's documents shown in TensorBoard's projector; 0 shows none.
        baselines: at most so many queries, and twice as many documents, of which the first search among the tasks
            compares Recall@1 with a plain method (photos with a colour histogram, texts with BM25 over titles) and with
            the towers before training; 0 compares nothing.
    """

    split: str = "val"
    batch_size: PositiveInt = 128
    tasks: tuple[str, ...] = ()
    final_tasks: tuple[str, ...] = ()
    views: tuple[str, ...] = ("both",)
    category: str = ""
    learn_split: str = "train"
    slices: tuple[str, ...] = ()
    distractors: tuple[Path, ...] = ()
    panel: NonNegativeInt = 8
    projector: NonNegativeInt = 1000
    baselines: NonNegativeInt = 1000


@dataclass(frozen=True)
class Found:
    """Result of a task, the same on every rank: metric -> value, `queries` (their number) among them; a row for each
    slice; rows of the panel; what `harness.evaluate.signs` looks at.
    On the first rank of dp only: failures, where Gallery.worst asks for them.
    """

    figures: dict[str, float]
    rows: list[dict[str, Any]] = field(default_factory=list)
    panel: list[Shown] = field(default_factory=list)
    signs: dict[str, float] = field(default_factory=dict)
    failures: Failures | None = None


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """Inputs of a task.

    Args:
        config: keys of evaluation, the task's own among them.
        documents: the catalogue's own documents; their labels are classes.
        side: (query or document, split) -> the catalogue's queries or documents of another split; raises UserError
            where there are none.
        classes: the run's classes.parquet; None where no run trained on classes.
        keys: numbers of the class keys, which labels are.
        embedder: embeds queries and documents.
        mesh: the ranks.
    """

    config: Any
    documents: Side
    side: Callable[[str, str], Side]
    classes: Path | None
    keys: ClassKeys
    embedder: Embedder
    mesh: Mesh


class Task(ABC):
    """An evaluation task.

    Attributes:
        name: its name in `evaluation.tasks`.
        config: frozen dataclass of its own keys under `evaluation`, derived from CommonConfig; that where it has none.
        attributes: those keys that name attributes of the catalogue, which the columns of its sides are then.
        sample: of a search, what baselines are computed on and signs look at; None where there is nothing.

    Raises:
        UserError: the catalogue has nothing that it could ask.
    """

    name: ClassVar[str]
    config: ClassVar[type[CommonConfig]] = CommonConfig
    attributes: ClassVar[tuple[str, ...]] = ()
    sample: Sample | None = None

    @abstractmethod
    def __init__(self, inputs: TaskInputs) -> None: ...

    @staticmethod
    def errors(config: Any) -> list[str]:
        """Errors in the keys of evaluation that the task reads; each names its key."""
        return []

    @abstractmethod
    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        """Embeds the queries, ranks and measures; collective. `seen` is what the method sees of the documents, one of
        its views.
        """


class Gallery:
    """The documents of one evaluation, embedded when first asked for.

    Args:
        embedder: embeds them.
        sides: the catalogue's own documents, then those of other catalogues.
        method: as it is.

    Attributes:
        worst: worst queries that a task keeps as its failures.
    """

    def __init__(self, embedder: Embedder, sides: Sequence[Side], method: Method) -> None:
        self.embedder, self.sides, self.method = embedder, sides, method
        self.worst = 0
        self._known: dict[tuple[int, str], Embedded] = {}

    def own(self, seen: str = "both") -> Embedded:
        """This rank's share of the catalogue's own documents."""
        return self._side(0, seen)

    def whole(self, seen: str = "both") -> Embedded:
        """This rank's share of all documents."""
        return joined([self.own(seen), *self.others(seen)])

    def others(self, seen: str = "both") -> list[Embedded]:
        """This rank's share of each other catalogue's documents."""
        return [self._side(number, seen) for number in range(1, len(self.sides))]

    def _side(self, number: int, seen: str) -> Embedded:
        if (number, seen) not in self._known:
            self._known[number, seen] = self.embedder.embed(self.method, self.sides[number], seen)
        return self._known[number, seen]


def require_attributes(side_of_catalogue: Any, names: Iterable[str], key: str) -> None:
    """Raises UserError where the catalogue lacks one of the attributes that `key` of the configuration names."""
    for name in names:
        if name not in side_of_catalogue.attributes:
            raise UserError(
                f"{key} names '{name}', no attribute of {side_of_catalogue.path}",
                f"It has {', '.join(side_of_catalogue.attributes) or 'none'} (ingest --attribute-columns)",
            )


def gathered(own: list[Row], mesh: Mesh) -> list[Row]:
    """The few rows of all ranks, sorted; collective."""
    parts: list[Any] = gather_objects(own, mesh.dp)
    return sorted(row for part in parts for row in part)


def joined(parts: Sequence[Embedded]) -> Embedded:
    """Several shares as one."""
    if len(parts) == 1:
        return parts[0]
    columns = ([getattr(part, name) for part in parts] for name in ("vectors", "ids", "labels"))
    return Embedded(*(torch.cat(column) for column in columns))


def spread(own: Embedded, ids: np.ndarray, count: int) -> Embedded:
    """Those of this rank among at most `count` that are spread evenly over all `ids`."""
    count = min(count, len(ids))
    wanted = torch.from_numpy(ids[np.arange(count) * len(ids) // max(1, count)])
    mine = torch.isin(own.ids, wanted.to(own.ids.device))
    return Embedded(own.vectors[mine], own.ids[mine], own.labels[mine])


def total(documents: Embedded, mesh: Mesh) -> int:
    """Documents of all ranks; collective."""
    count = torch.tensor(len(documents.ids), device=mesh.device)
    dist.all_reduce(count, group=mesh.dp)
    return int(count)


def groups_of(side: Side, names: Sequence[str]) -> dict[str, Coded]:
    """Attributes by whose values there are slices."""
    return {name: side.columns[name].with_null(str(None)) for name in names}


def ordered(groups: dict[str, Coded], ids: np.ndarray, ranks: RelevantRanks) -> dict[str, Coded]:
    """Groups of all `ids` (ascending), in the order of the ranks."""
    rows = np.searchsorted(ids, ranks.query_ids)
    return {name: column.take(rows) for name, column in groups.items()}
