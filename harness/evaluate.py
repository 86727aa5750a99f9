"""Evaluation: embed queries and documents over the ranks, rank exactly, report metrics and slices. `shelfmark eval RUN`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from harness.data.catalogue import Catalogue
from harness.data.loader import DataConfig
from harness.data.tokenizer import FIELDS, Tokenizer
from harness.embed import Embedder, side_of
from harness.errors import UserError
from harness.mesh import Mesh
from harness.methods import Method
from harness.metrics import slices, summarise
from harness.retrieval import Embedded, RelevantRanks, relevant_ranks, top_k


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is evaluated, during training and by `shelfmark eval`.

    Args:
        split: split of the queries (and of documents that are not in every split).
        batch_size: images embedded at once.
        slices: attribute columns of the catalogue whose values get figures of their own.
        distractors: other catalogues whose documents join the gallery, relevant to nothing.
        panel: queries shown with their best documents in TensorBoard.
        projector: at most so many of the catalogue's documents shown in TensorBoard's projector; 0 shows none.
    """

    split: str = "val"
    batch_size: int = 128
    slices: tuple[str, ...] = ()
    distractors: tuple[Path, ...] = ()
    panel: int = 8
    projector: int = 1000

    def errors(self) -> list[str]:
        """What is out of range, as sentences that name the key."""
        errors = []
        if self.batch_size < 1:
            errors.append("evaluation.batch_size must be at least 1")
        errors += [
            f"evaluation.{name} must be at least 0" for name in ("panel", "projector") if getattr(self, name) < 0
        ]
        return errors


@dataclass(frozen=True)
class Report:
    """What an evaluation found; the same on every rank, `sample` excepted.

    figures: metric -> value; rows: one for each slice value; panel: (query id, its best document ids), by query id;
    sample: on the first rank of dp config.projector documents spread evenly over the catalogue's own, by id, on the CPU; None elsewhere.
    """

    figures: dict[str, float]
    rows: list[dict[str, Any]]
    panel: list[tuple[int, list[int]]]
    sample: Embedded | None


class Evaluation:
    """One catalogue's retrieval task, ready to be run at any step.

    Args:
        config: split, slices, distractors.
        data: the run's preprocessing and decoder.
        model: the method's configuration: embedding_dim and text.max_length.
        catalogue: the catalogue with queries and documents.
        tokenizer: the run's tokenizer; it encodes distractors too.
        classes: the run's classes.parquet, for the slices seen / never trained and head / tail.
        mesh: the ranks.

    Raises:
        UserError: the split has no query or no document, or a slice names no attribute.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        data: DataConfig,
        model: Any,
        catalogue: Catalogue,
        tokenizer: Tokenizer,
        classes: Path,
        mesh: Mesh,
    ) -> None:
        self.config, self.mesh = config, mesh
        self.embedder = Embedder(data, model, tokenizer, config.batch_size, mesh)
        for name in config.slices:
            if name not in catalogue.attributes:
                raise UserError(
                    f"evaluation.slices names '{name}', no attribute of {catalogue.path}",
                    f"It has {', '.join(catalogue.attributes) or 'none'} (ingest --attribute-columns)",
                )
        keys: dict[str, int] = {}
        self.documents = [side_of(catalogue, "document", config.split, [*FIELDS], keys, 0)]
        self.queries = side_of(catalogue, "query", config.split, [*config.slices], keys, 0)
        for side in (self.queries, self.documents[0]):
            if not len(side.ids):
                splits = ", ".join(catalogue.meta["counts"]["splits"])
                raise UserError(
                    f"split '{config.split}' of {catalogue.path} has no {side.kind}",
                    f"The splits are {splits} (evaluation.split)",
                )
        offset = catalogue.num_samples
        for path in config.distractors:
            other = Catalogue(path)
            self.documents.append(side_of(other, "document", None, [*FIELDS], None, offset))
            offset += other.num_samples
        self.groups = self._groups(keys, classes)

    def run(self, method: Method) -> Report:
        """Embeds, ranks and measures; collective. The towers are left in training mode if they were."""
        training = method.towers.training
        method.towers.eval()
        try:
            documents = [self.embedder.embed(method, side) for side in self.documents]
            gallery = Embedded(
                torch.cat([d.vectors for d in documents]),
                torch.cat([d.ids for d in documents]),
                torch.cat([d.labels for d in documents]),
            )
            queries = self.embedder.embed(method, self.queries)
            ranks = relevant_ranks(queries, gallery, self.mesh.dp)
            shown = self._shown(queries)
            best, _ = top_k(shown, gallery, 5, self.mesh.dp)
        finally:
            method.towers.train(training)
        figures = {**summarise(ranks.ranks, ranks.offsets), "documents": float(sum(len(d.ids) for d in self.documents))}
        own = list(zip(shown.ids.tolist(), best.tolist(), strict=True))
        parts: list[Any] = [None] * self.mesh.dp.size()
        dist.all_gather_object(parts, own, group=self.mesh.dp)
        panel = sorted(row for part in parts for row in part)
        rows = slices(ranks.ranks, ranks.offsets, self._ordered(ranks))
        return Report(figures, rows, panel, self._sample(documents[0]))

    def _groups(self, keys: dict[str, int], classes: Path) -> dict[str, np.ndarray]:
        """Slice name -> value of each query, in query order."""
        table = pq.read_table(classes, columns=["class_key", "tail"]).to_pydict()
        kind = {keys[key]: "tail" if tail else "head" for key, tail in zip(*table.values(), strict=True) if key in keys}
        groups = {name: np.array([str(v) for v in self.queries.columns[name]]) for name in self.config.slices}
        groups["class"] = np.array([kind.get(label, "never trained") for label in self.queries.labels.tolist()])
        return groups

    def _ordered(self, ranks: RelevantRanks) -> dict[str, np.ndarray]:
        rows = np.searchsorted(self.queries.ids, ranks.query_ids)
        return {name: values[rows] for name, values in self.groups.items()}

    def _shown(self, queries: Embedded) -> Embedded:
        """This rank's queries of the panel."""
        return _spread(queries, self.queries.ids, self.config.panel)

    def _sample(self, documents: Embedded) -> Embedded | None:
        """`Report.sample`, gathered from the ranks' shares; collective over dp."""
        mine, dp = _spread(documents, self.documents[0].ids, self.config.projector), self.mesh.dp
        own = (mine.vectors.float().cpu(), mine.ids.cpu(), mine.labels.cpu())
        parts: list[Any] | None = [None] * dp.size() if dp.rank() == 0 else None
        dist.gather_object(own, parts, group=dp, group_dst=0)
        if parts is None:
            return None
        vectors, ids, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = ids.argsort()
        return Embedded(vectors[order], ids[order], labels[order])


def _spread(own: Embedded, ids: np.ndarray, count: int) -> Embedded:
    """Those of this rank among at most `count` that are spread evenly over all `ids`."""
    count = min(count, len(ids))
    wanted = torch.from_numpy(ids[np.arange(count) * len(ids) // max(1, count)])
    mine = torch.isin(own.ids, wanted.to(own.ids.device))
    return Embedded(own.vectors[mine], own.ids[mine], own.labels[mine])


def print_report(report: Report, title: str) -> None:
    """The report as a table on standard output."""
    metrics = [name for name in report.figures if "_at_" in name or name in ("map", "mrr")]
    header = f"{'':<32}{'queries':>9}" + "".join(f"{name:>14}" for name in metrics)
    lines = [title, header, _line("all", report.figures, metrics)]
    lines += [_line(f"{row['slice']} = {row['value']}", row, metrics) for row in report.rows]
    print("\n".join(lines))


def _line(name: str, figures: dict[str, Any], metrics: Sequence[str]) -> str:
    values = "".join(f"{figures[m]:>14.4f}" if math.isfinite(figures[m]) else f"{'-':>14}" for m in metrics)
    return f"{name[:31]:<32}{int(figures['queries']):>9}{values}"
