"""Evaluation: the tasks that a recipe names, over the ranks, with metrics and slices. `shelfmark eval RUN`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import require_whole
from harness.core.errors import UserError
from harness.core.files import printable
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.data.config import DataConfig
from harness.evaluate.baselines import Baselines, Sample
from harness.evaluate.calibration import CalibrationConfig, calibrate, documents_to_fit
from harness.evaluate.embed import ClassKeys, Embedder, Side, side_of
from harness.evaluate.explain import Why, explain
from harness.evaluate.ranking import Embedded
from harness.evaluate.slice_rows import largest
from harness.evaluate.tasks.registry import TASKS
from harness.evaluate.tasks.task import (
    CommonConfig,
    Found,
    Gallery,
    Shown,
    Task,
    TaskInputs,
    require_attributes,
    spread,
)
from harness.text.tokenizer import Tokenizer
from models.comm import gather_to_first
from models.method import Calibration, Method, MethodConfig
from models.registry import METHODS

COUNTS = ("queries", "queries_without_relevant", "documents")  # figures that are no metrics
_OF_TASKS = dict.fromkeys(task.config for task in TASKS.values() if task.config is not CommonConfig)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(CalibrationConfig, *_OF_TASKS):  # type: ignore[misc]
    """Configuration of evaluation, during training and by `shelfmark eval`; tasks add keys of their own."""

    def errors(self, method: str) -> list[str]:
        """Errors for tasks or views that the method lacks; each names its key."""
        errors, spec = [], METHODS[method]
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
        if not self.views:
            errors.append("evaluation.views is empty")
        return errors or [error for name in self.asked(method) for error in TASKS[name].errors(self)]

    def asked(self, method: str) -> list[str]:
        """Names of all tasks, those of the end last."""
        return [*dict.fromkeys([*(self.tasks or METHODS[method].tasks[:1]), *self.final_tasks])]


@dataclass(frozen=True)
class Report:
    """Result of an evaluation; the same on every rank, `sample` excepted.

    found: task, or task/view, -> its figures and slices, the first task's view first; sample: on the first rank of dp
    config.projector documents spread evenly over the catalogue's own, by id, on the CPU; None elsewhere; why: id ->
    explanation of the documents of the catalogue's own that the panel shows first, and of those of failures.
    """

    found: dict[str, Found]
    sample: Embedded | None
    why: dict[int, Why] = field(default_factory=dict)

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
    def signs(self) -> dict[str, float]:
        """Those of the task that is compared with baselines; empty without it."""
        return self.found[self.compared].signs if self.compared else {}

    @property
    def compared(self) -> str | None:
        """The first of `found` that has signs."""
        return next((name for name, found in self.found.items() if found.signs), None)

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
        model: the method's configuration.
        catalogue: the catalogue with queries and documents.
        tokenizer: the run's tokenizer, which encodes distractors too; None for a model that reads no texts.
        classes: the run's classes.parquet, for the slices seen / never trained and head / tail; None without a run.
        mesh: the ranks.
        calibration: the method's, where `calibrate` will be called.

    Raises:
        UserError: the split has nothing that a task or the calibration needs, or lacks an attribute.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        method: str,
        data: DataConfig,
        model: MethodConfig,
        catalogue: Catalogue,
        tokenizer: Tokenizer | None,
        classes: Path | None,
        mesh: Mesh,
        calibration: Calibration | None = None,
    ) -> None:
        config = replace(config, slices=_present(config.slices, catalogue, mesh))
        self.config, self.mesh, self.catalogue = config, mesh, catalogue
        self.embedder = Embedder(data, model, tokenizer, config.batch_size, mesh)
        self._keys = ClassKeys()
        self._columns = self._attributes()
        self.documents = [self.side("document", config.split)]
        offset = catalogue.num_samples
        inputs = TaskInputs(
            config=config,
            documents=self.documents[0],
            side=self.side,
            classes=classes,
            keys=self._keys,
            embedder=self.embedder,
            mesh=mesh,
        )
        made = {name: TASKS[name](inputs) for name in config.asked(method)}
        usual = len({*config.tasks}) or 1
        self.tasks, self.final_tasks = [*made.values()][:usual], [*made.values()][usual:]
        spec = METHODS.get(method)  # none of an image tower only
        self.beside = [] if spec is None else [view for view in spec.shown_beside(model) if view not in config.views]
        for path in config.distractors:
            require_whole(other := Catalogue(path), mesh)
            self.documents.append(side_of(other, "document", None, [], None, offset))
            offset += other.num_samples
        self.fitted_to: Side | None = None
        if calibration is not None:
            learned = self.side("document", config.learn_split)
            self.fitted_to = documents_to_fit(calibration, learned, config.align_documents)

    def calibrate(self, method: Method) -> None:
        """Fits the method's calibration to the weights as they are; nothing without one. Collective."""
        if self.fitted_to is not None:
            calibrate(method, self.fitted_to, self.embedder)

    def run(self, method: Method, final: bool = True, worst: int = 0) -> Report:
        """Embeds, ranks and measures; collective. `final` asks final_tasks too. The towers are left in training mode if
        they were. `worst` queries of each task are kept as its failures, of the first view.
        """
        training = method.towers.training
        method.towers.eval()
        gallery = Gallery(self.embedder, self.documents, method)
        found = {}
        try:
            for task in [*self.tasks, *(self.final_tasks if final else [])]:
                for seen in [*self.config.views, *(self.beside if task is self.tasks[0] else [])]:
                    gallery.worst = worst if seen == self.config.views[0] else 0
                    name = task.name if seen == self.config.views[0] else f"{task.name}/{seen}"
                    found[name] = task.run(method, gallery, seen)
            report = Report(found, self._sample(gallery.own(self.config.views[0])))
            return replace(report, why=self._why(method, report))
        finally:
            method.towers.train(training)

    def _why(self, method: Method, report: Report) -> dict[int, Why]:
        """`Report.why`; documents that were seen in part are not explained. Collective."""
        if not method.parts or self.config.views[0] != "both":
            return {}
        shown = on_first_rank(lambda: _explained(report), self.mesh, "choosing documents to explain")
        return explain(method, self.embedder, self.documents[0], shown)

    @property
    def compared(self) -> Task | None:
        """The first task that has a sample, which is compared with baselines."""
        return next((task for task in [*self.tasks, *self.final_tasks] if task.sample), None)

    @property
    def sample(self) -> Sample | None:
        """Queries and documents that baselines are computed on; None where there are none."""
        return self.compared.sample if self.compared else None

    @property
    def compared_group(self) -> str:
        """First part of its keys in a log: figures of the first task have plain names."""
        compared = self.compared
        return "retrieval" if compared is None or compared is self.tasks[0] else compared.name

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

    def _attributes(self) -> list[str]:
        """Attributes that slices and tasks name, each once.

        Raises:
            UserError: the catalogue lacks one that a task needs.
        """
        keys = dict.fromkeys(["slices", *(key for task in TASKS.values() for key in task.attributes)])
        named: dict[str, None] = {}
        for key in keys:
            value = getattr(self.config, key)
            names = [value] if isinstance(value, str) else [*value]
            require_attributes(self.catalogue, filter(None, names), f"evaluation.{key}")
            named |= dict.fromkeys(filter(None, names))
        return [*named]

    def _sample(self, documents: Embedded) -> Embedded | None:
        """`Report.sample`, gathered from the ranks' shares; collective over dp."""
        mine, dp = spread(documents, self.documents[0].ids, self.config.projector), self.mesh.dp
        columns = (mine.vectors.float(), mine.ids, mine.labels)
        vectors, ids, labels = (gather_to_first(column, dp).cpu() for column in columns)
        if dp.rank() != 0:
            return None
        order = ids.argsort()
        return Embedded(vectors[order], ids[order], labels[order])


def _explained(report: Report) -> list[int]:
    """Ids of documents whose explanation is shown."""
    shown = [best[0] for _, best, _ in report.panel if best]
    for found in report.found.values():
        for miss in found.failures.worst if found.failures else ():
            shown += [number for number, _, _ in miss.best]
            shown += [] if miss.answer is None else [miss.answer]
    return shown


def _present(slices: tuple[str, ...], catalogue: Catalogue, mesh: Mesh) -> tuple[str, ...]:
    """The slices that the catalogue has; the first rank names the others."""
    if mesh.rank == 0 and (absent := [name for name in slices if name not in catalogue.attributes]):
        there = ", ".join(printable(name, 40) for name in catalogue.attributes) or "none"
        print(
            f"warning: no figures by {', '.join(absent)} (evaluation.slices), no attribute of {catalogue.path}. It has "
            f"{there} (ingest --attribute-columns)"
        )
    return tuple(name for name in slices if name in catalogue.attributes)


def print_report(report: Report, title: str, baselines: Baselines | None = None) -> None:
    """The report as tables on standard output, one for each task; the baselines stand in that which is compared."""
    print(title)
    for name, found in report.found.items():
        metrics = [m for m in found.figures if m not in COUNTS and not m.startswith("weight_")]
        plain = [metric for metric in metrics if not metric.startswith("bare_")]
        width = max(14, *(len(metric) + 2 for metric in plain))
        print(f"{name:<32}{'queries':>9}" + "".join(f"{metric:>{width}}" for metric in plain))
        print(_line("all", found.figures, plain, width))
        if name == report.compared and baselines is not None:
            for other, recall in baselines.recall.items():
                compared = {**dict.fromkeys(plain, math.nan), "queries": baselines.queries, "recall_at_1": recall}
                print(_line(other, compared, plain, width))
            if (baselines.queries, baselines.documents) != (found.figures["queries"], found.figures["documents"]):
                print(f"baselines: {baselines}; own on these {found.signs['sample_recall_at_1']:.3f}")
        if "bare_queries" in found.figures:
            bare = {m.removeprefix("bare_"): v for m, v in found.figures.items() if m.startswith("bare_")}
            print(_line("titles without those words", bare, plain, width))
        for slice_name, rows, left_out in largest(found.rows):
            for row in rows:
                label = f"{slice_name} = {row['value']}"
                if "weights" in row:
                    shown = ", ".join(f"{part.removeprefix('weight_')} {w:.2f}" for part, w in row["weights"].items())
                    print(f"{printable(label, 31):<32}{row['documents']:>9}  {shown}")
                else:
                    print(_line(label, row, plain, width))
            if left_out:
                print(f"{printable(slice_name, 31)}: {left_out:,} smaller values are not shown (--json has all)")


def _line(name: str, figures: dict[str, Any], metrics: Sequence[str], width: int) -> str:
    values = (f"{figures[m]:>{width}.4f}" if math.isfinite(figures[m]) else f"{'-':>{width}}" for m in metrics)
    return f"{printable(name, 31):<32}{int(figures['queries']):>9}" + "".join(values)
