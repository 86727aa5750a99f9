"""Evaluation: the tasks that a recipe names, over the ranks, with metrics and slices. `shelfmark eval RUN`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import require_whole
from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.mesh import Mesh
from harness.data.config import DataConfig
from harness.evaluate.attribute_queries import AttributeQueries
from harness.evaluate.category import CategoryTask
from harness.evaluate.embed import ClassKeys, Embedder, Side, side_of
from harness.evaluate.ranking import Embedded
from harness.evaluate.tasks import (
    Found,
    Gallery,
    PhotoTask,
    SameProductTask,
    Shown,
    Task,
    TextTask,
    head_and_tail,
    require_attributes,
    spread,
)
from harness.text.tokenizer import Tokenizer
from models.registry import METHODS, Method


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Configuration of evaluation, during training and by `shelfmark eval`.

    Args:
        split: split of the queries (and of documents that are not in every split).
        batch_size: images embedded at once.
        tasks: what is asked: photo, text, same_product, category; none names the method's usual one. Figures of the
            first keep plain names.
        final_tasks: what is asked besides once training has ended.
        views: what is seen of documents: both, title, image; more than one is a modality drop.
        query_attributes: attributes that the queries of the task text are made of.
        bare_titles: attributes whose values' words are also tried without, in the titles of the task text.
        category: attribute that the task category predicts, and by whose values MAKE's weights are reported.
        learn_split: split of the documents that the task category learns from; those that are also in `split` do not
            teach.
        probe_documents: at most so many documents teach the task category, and at most so many are asked, chosen by
            their ids: one rank holds them.
        align_documents: at most so many documents of learn_split that a method's alignment of its views is fitted to
            (model.aligned).
        slices: attribute columns of the catalogue whose values get figures of their own.
        distractors: other catalogues whose documents join the gallery, relevant to nothing.
        panel: queries shown with their best documents in TensorBoard.
        projector: at most so many of the catalogue's documents shown in TensorBoard's projector; 0 shows none.
    """

    split: str = "val"
    batch_size: int = 128
    tasks: tuple[str, ...] = ()
    final_tasks: tuple[str, ...] = ()
    views: tuple[str, ...] = ("both",)
    query_attributes: tuple[str, ...] = ()
    bare_titles: tuple[str, ...] = ()
    category: str = ""
    learn_split: str = "train"
    probe_documents: int = 200_000
    align_documents: int = 8192
    slices: tuple[str, ...] = ()
    distractors: tuple[Path, ...] = ()
    panel: int = 8
    projector: int = 1000

    def errors(self, method: str) -> list[str]:
        """Errors for values out of range and for tasks or views that the method lacks; each names its key."""
        errors, spec = [], METHODS[method]
        if self.batch_size < 1:
            errors.append("evaluation.batch_size must be at least 1")
        errors += [
            f"evaluation.{name} must be at least 2"
            for name in ("align_documents", "probe_documents")
            if getattr(self, name) < 2
        ]
        errors += [
            f"evaluation.{name} must be at least 0" for name in ("panel", "projector") if getattr(self, name) < 0
        ]
        for key, given, known in (
            ("tasks", self.tasks, spec.tasks),
            ("final_tasks", self.final_tasks, spec.tasks),
            ("views", self.views, spec.views),
        ):
            errors += [
                f"evaluation.{key} has '{name}'; {method} knows {', '.join(known)}"
                for name in given
                if name not in known
            ]
        asked = {*(self.tasks or spec.tasks[:1]), *self.final_tasks}
        if "text" in asked and not self.query_attributes:
            errors.append("evaluation.query_attributes is empty: the task text makes its queries of attributes")
        if "category" in asked and not self.category:
            errors.append("evaluation.category is empty: the task category predicts an attribute")
        if not self.views:
            errors.append("evaluation.views is empty")
        return errors


@dataclass(frozen=True)
class Report:
    """Result of an evaluation; the same on every rank, `sample` excepted.

    found: task, or task/view, -> its figures and slices, the first task's view first; sample: on the first rank of dp
    config.projector documents spread evenly over the catalogue's own, by id, on the CPU; None elsewhere.
    """

    found: dict[str, Found]
    sample: Embedded | None

    @property
    def figures(self) -> dict[str, float]:
        """metric -> value of the first task; task/metric of the others."""
        first, *others = self.found
        more = {f"{name}/{metric}": value for name in others for metric, value in self.found[name].figures.items()}
        return {**self.found[first].figures, **more}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The slices of all tasks."""
        first = next(iter(self.found))
        return [
            row if name == first else {"task": name, **row} for name, found in self.found.items() for row in found.rows
        ]

    @property
    def panel(self) -> list[Shown]:
        """The first panel that there is."""
        return next((found.panel for found in self.found.values() if found.panel), [])


class Evaluation:
    """One catalogue's tasks, ready to be run at any step.

    Args:
        config: tasks, split, slices, distractors.
        method: its name.
        data: the run's preprocessing and decoder.
        model: the method's configuration: embedding_dim and text.max_length.
        catalogue: the catalogue with queries and documents.
        tokenizer: the run's tokenizer; it encodes distractors too.
        classes: the run's classes.parquet, for the slices seen / never trained and head / tail.
        mesh: the ranks.

    Raises:
        UserError: the split has nothing that a task needs, or an attribute is unknown.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        method: str,
        data: DataConfig,
        model: Any,
        catalogue: Catalogue,
        tokenizer: Tokenizer,
        classes: Path,
        mesh: Mesh,
    ) -> None:
        self.config, self.mesh, self.catalogue, self.classes = config, mesh, catalogue, classes
        self.embedder = Embedder(data, model, tokenizer, config.batch_size, mesh)
        for key in ("slices", "query_attributes", "bare_titles"):
            require_attributes(catalogue, getattr(config, key), f"evaluation.{key}")
        require_attributes(catalogue, [config.category] if config.category else [], "evaluation.category")
        self._keys = ClassKeys()
        named = dict.fromkeys([*config.slices, *config.query_attributes, *config.bare_titles, config.category])
        self._columns = [name for name in named if name]
        self.documents = [self.side("document", config.split)]
        offset = catalogue.num_samples
        usual = config.tasks or METHODS[method].tasks[:1]
        self.tasks = [self._task(name) for name in usual]
        self.final_tasks = [self._task(name) for name in config.final_tasks if name not in usual]
        for path in config.distractors:
            require_whole(other := Catalogue(path), mesh)
            self.documents.append(side_of(other, "document", None, [], None, offset))
            offset += other.num_samples

    def run(self, method: Method, final: bool = True) -> Report:
        """Embeds, ranks and measures; collective. `final` asks final_tasks too. The towers are left in training mode if
        they were.
        """
        training = method.towers.training
        method.towers.eval()
        gallery = Gallery(self.embedder, self.documents, method)
        found = {}
        try:
            for task in [*self.tasks, *(self.final_tasks if final else [])]:
                for seen in self.config.views:
                    name = task.name if seen == self.config.views[0] else f"{task.name}/{seen}"
                    found[name] = task.run(method, gallery, seen)
            return Report(found, self._sample(gallery.own(self.config.views[0])))
        finally:
            method.towers.train(training)

    def _task(self, name: str) -> Task:
        config, documents = self.config, self.documents[0]
        if name == "photo":
            queries, kinds = self.side("query", config.split), head_and_tail(self.classes, self._keys)
            return PhotoTask(queries, documents, config.slices, kinds, config.panel, self.embedder, self.mesh)
        if name == "same_product":
            return SameProductTask(documents, config.slices, self.mesh)
        if name == "category":
            learned = self.side("document", config.learn_split)
            if config.learn_split != config.split:  # documents of split 'all' are asked, so they may not teach
                learned = learned.select(~np.isin(learned.ids, documents.ids))
            return CategoryTask(learned, documents, config.category, self.embedder, self.mesh, config.probe_documents)
        texts = AttributeQueries(documents, config.query_attributes)
        return TextTask(texts, config.bare_titles, config.category, config.panel, self.embedder, self.mesh)

    def side(self, kind: str, split: str) -> Side:
        """The catalogue's queries or documents of a split.

        Raises:
            UserError: there are none.
        """
        side = side_of(self.catalogue, kind, split, self._columns, self._keys, 0)
        if not len(side.ids):
            splits = ", ".join(self.catalogue.meta["counts"]["splits"])
            raise UserError(
                f"split '{split}' of {self.catalogue.path} has no {kind}",
                f"The splits are {splits} (evaluation.split, evaluation.learn_split)",
            )
        return side

    def _sample(self, documents: Embedded) -> Embedded | None:
        """`Report.sample`, gathered from the ranks' shares; collective over dp."""
        mine, dp = spread(documents, self.documents[0].ids, self.config.projector), self.mesh.dp
        own = (mine.vectors.float().cpu(), mine.ids.cpu(), mine.labels.cpu())
        parts: list[Any] | None = [None] * dp.size() if dp.rank() == 0 else None
        dist.gather_object(own, parts, group=dp, group_dst=0)
        if parts is None:
            return None
        vectors, ids, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = ids.argsort()
        return Embedded(vectors[order], ids[order], labels[order])


def print_report(report: Report, title: str) -> None:
    """The report as tables on standard output, one for each task."""
    print(title)
    for name, found in report.found.items():
        metrics = [
            m for m in found.figures if "_at_" in m or m in ("map", "mrr") or m.endswith(("accuracy", "macro_f1"))
        ]
        plain = [metric for metric in metrics if not metric.startswith("bare_")]
        width = max(14, *(len(metric) + 2 for metric in plain))
        print(f"{name:<32}{'queries':>9}" + "".join(f"{metric:>{width}}" for metric in plain))
        print(_line("all", found.figures, plain, width))
        if "bare_queries" in found.figures:
            bare = {m.removeprefix("bare_"): v for m, v in found.figures.items() if m.startswith("bare_")}
            print(_line("titles without those words", bare, plain, width))
        for row in found.rows:
            label = f"{row['slice']} = {row['value']}"
            if "weights" in row:
                shown = ", ".join(f"{part.removeprefix('weight_')} {w:.2f}" for part, w in row["weights"].items())
                print(f"{printable(label, 31):<32}{row['documents']:>9}  {shown}")
            else:
                print(_line(label, row, plain, width))


def _line(name: str, figures: dict[str, Any], metrics: Sequence[str], width: int) -> str:
    values = (f"{figures[m]:>{width}.4f}" if math.isfinite(figures[m]) else f"{'-':>{width}}" for m in metrics)
    return f"{printable(name, 31):<32}{int(figures['queries']):>9}" + "".join(values)
