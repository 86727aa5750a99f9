"""Evaluation on every number of ranks, with distractors, slices and queries that have no answer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from harness.catalogue.catalogue import Catalogue
from harness.core.errors import UserError
from harness.evaluate.evaluation import Evaluation, Report
from harness.train.panels import panel_rows
from tests.catalogues import make_catalogue
from tests.pool import ranks
from tests.runs import UNUSED, tiny_config, trainer

METRICS = ("recall_at_1", "recall_at_5", "recall_at_10", "map", "ndcg_at_10", "mrr")


def evaluated(
    catalogue: Path, settings: dict[str, Any], tensor_parallel: int = 1
) -> tuple[Report, dict[int, np.ndarray]]:
    """Evaluates the weights that the seed gives; also each rank's query vectors by sample id."""
    with trainer(tiny_config(catalogue, UNUSED, **settings), ready=False) as t:
        report = t.validation.evaluation.run(t.method)
        queries = t.validation.evaluation.embedder.embed(t.method, t.validation.evaluation.tasks[0].queries)
        vectors = dict(zip(queries.ids.tolist(), queries.vectors.numpy(), strict=True))
        assert t.method.towers.training
    return report, vectors


def find(report: Report, name: str, value: str, task: str | None = None) -> dict[str, Any]:
    (row,) = [row for row in report.rows if (row["slice"], row["value"], row.get("task")) == (name, value, task)]
    return row


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """To the last digit, with NaN equal to itself."""
    return a.keys() == b.keys() and all(
        x == y or (x != x and y != y) for x, y in zip(a.values(), b.values(), strict=True)
    )


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another catalogue, of 10 documents and 20 queries; its class keys are those of the first one."""
    return make_catalogue(tmp_path_factory.mktemp("noise"), classes=10, queries=2, seed=5)


def rewritten(catalogue: Path, folder: Path, change: Any) -> Path:
    """A copy of a catalogue with other rows in samples/: change(row: dict) -> dict."""
    shutil.copytree(catalogue, folder)
    (part,) = (folder / "samples").glob("part-*.parquet")
    table = pq.read_table(part)
    pq.write_table(pa.Table.from_pylist([change(row) for row in table.to_pylist()], table.schema), part)
    return folder


# Batches of 4 cut the 6 queries and the gallery unevenly: some ranks have one batch more, or none at all.
SHARDED = {"evaluation.batch_size": 4, "evaluation.slices": ["colour", "shape"], "evaluation.panel": 4}


@pytest.mark.parametrize("split", ["val", "train"])
def test_every_number_of_ranks_finds_the_same(catalogue: Path, noise: Path, split: str) -> None:
    settings = {**SHARDED, "evaluation.split": split, "evaluation.distractors": [str(noise)]}
    ((wanted, vectors),) = ranks(1).run(evaluated, catalogue, settings)
    assert wanted.figures["queries"] == {"val": 6, "train": 18}[split] and 0 < wanted.figures["map"] < 1
    for world in (2, 3):
        found = ranks(world).run(evaluated, catalogue, settings)
        for report, _ in found:
            assert equal(report.figures, wanted.figures)
            assert all(equal(a, b) for a, b in zip(report.rows, wanted.rows, strict=True))
        shared: dict[int, np.ndarray] = {}
        for _, own in found:
            assert not shared.keys() & own.keys(), "a query was embedded twice"
            shared |= own
        assert shared.keys() == vectors.keys()
        assert all((shared[i] == vectors[i]).all() for i in vectors), "a vector depends on the number of ranks"
        assert all(report.panel == wanted.panel for report, _ in found)


def test_slices_are_parts_of_the_whole(catalogue: Path) -> None:
    report, _ = evaluated(catalogue, {**SHARDED, "evaluation.panel": 6})
    assert {row["slice"] for row in report.rows} == {"colour", "shape", "class"}
    for name in ("colour", "shape", "class"):
        rows = [row for row in report.rows if row["slice"] == name and "task" not in row]
        assert sum(row["queries"] for row in rows) == report.figures["queries"] == 6
        for metric in METRICS:
            mean = sum(row[metric] * row["queries"] for row in rows) / 6
            assert mean == pytest.approx(report.figures[metric], rel=1e-12)
    # Classes c0 .. c5: four colours in turn, the first four discs.
    assert [find(report, "colour", colour)["queries"] for colour in ("red", "green", "blue", "yellow")] == [2, 2, 1, 1]
    assert [find(report, "shape", shape)["queries"] for shape in ("disc", "box")] == [4, 2]
    # Six samples a class, its document first: what the panel shows of all queries gives the same recall.
    for number, colour in enumerate(("red", "green", "blue", "yellow")):
        shown = [(query // 6 * 6, best) for query, best, _ in report.panel if query // 6 % 4 == number]
        row = find(report, "colour", colour)
        assert row["recall_at_1"] == np.mean([best[0] == right for right, best in shown])
        assert row["recall_at_5"] == np.mean([right in best for right, best in shown])
    assert len({find(report, "colour", colour)["map"] for colour in ("red", "green", "blue", "yellow")}) > 1


def test_images_alone_are_shown_beside_the_fused_documents(catalogue: Path) -> None:
    """Figures, slices and vectors of the view image, without being asked for; a fusion without text has no other."""
    beside, _ = evaluated(catalogue, SHARDED)
    alone, _ = evaluated(catalogue, {**SHARDED, "evaluation.views": ["image"]})
    assert set(alone.found) == {"photo"} and set(beside.found) == {"photo", "photo/image"}
    assert {metric: beside.figures[f"photo/image/{metric}"] for metric in METRICS} == {
        metric: alone.figures[metric] for metric in METRICS
    }
    assert find(beside, "class", "head", "photo/image")["map"] == find(alone, "class", "head")["map"]
    assert beside.figures["map"] != beside.figures["photo/image/map"]
    without, _ = evaluated(catalogue, {**SHARDED, "model.fusion_kind": "image"})
    assert set(without.found) == {"photo"}


def test_distractors_join_the_gallery_and_answer_nothing(catalogue: Path, noise: Path) -> None:
    alone, _ = evaluated(catalogue, SHARDED)
    twice = {**SHARDED, "evaluation.distractors": [str(noise), str(catalogue)], "evaluation.panel": 6}
    among, _ = evaluated(catalogue, twice)
    assert (alone.figures["documents"], among.figures["documents"]) == (6, 6 + 10 + 6)
    assert among.figures["queries"] == 6 and among.figures["queries_without_relevant"] == 0
    for metric in METRICS:
        assert among.figures[metric] <= alone.figures[metric]
    assert among.figures["map"] < alone.figures["map"]
    # The catalogue as its own distractor repeats every right answer: the copy scores the same, counts as wrong and,
    # with the higher id, stands behind it. So the first answers keep their place, but nothing else does.
    copies, _ = evaluated(catalogue, {**SHARDED, "evaluation.distractors": [str(catalogue)]})
    assert copies.figures["recall_at_1"] == alone.figures["recall_at_1"]
    assert copies.figures["mrr"] < alone.figures["mrr"]
    # Ids are unique over all galleries, in the order in which they were named.
    seen = {i for _, best, _ in among.panel for i in best}
    assert seen <= {*range(36), *range(36, 36 + 30), *range(66, 66 + 36)} and max(seen) >= 36
    # The panel draws only what lies in the catalogue itself.
    drawn = [len(documents) for _, documents in panel_rows(among, Catalogue(catalogue))]
    assert drawn == [sum(i < 36 for i in best) for _, best, _ in among.panel]


def test_text_of_distractors_is_read_by_the_runs_tokenizer(catalogue: Path, noise: Path) -> None:
    """The noise catalogue has no tokenizer of its own; the catalogue as its own distractor gives its own vectors."""
    assert not (noise / "tokenizer").exists()
    settings = {**SHARDED, "evaluation.distractors": [str(catalogue), str(noise)]}
    with trainer(tiny_config(catalogue, UNUSED, **settings), ready=False) as t:
        own, copy, other = (
            t.validation.evaluation.embedder.embed(t.method, side) for side in t.validation.evaluation.documents
        )
    assert torch.equal(own.vectors, copy.vectors) and torch.equal(own.ids + 36, copy.ids)
    assert (own.labels >= 0).all() and (copy.labels == -1).all() and (other.labels == -1).all()
    assert not torch.equal(own.vectors, other.vectors[:6])
    assert len(torch.cat([own.ids, copy.ids, other.ids]).unique()) == 6 + 6 + 10


def test_head_tail_and_never_trained_classes(catalogue: Path, tmp_path: Path) -> None:
    classes = pq.read_table(catalogue / "classes" / "classes.parquet").to_pylist()[:4]  # c4 and c5 are in no class map
    changed = [{**row, "tail": row["class_key"] in ("c0", "c2", "c3")} for row in classes]
    with trainer(tiny_config(catalogue, UNUSED, **SHARDED), ready=False) as t:
        pq.write_table(pa.Table.from_pylist(changed), tmp_path / "classes.parquet")
        evaluation = Evaluation(
            t.config.evaluation,
            t.config.method,
            t.config.data,
            t.config.model,
            t.loader.catalogue,
            t.tokenizer,
            tmp_path / "classes.parquet",
            t.mesh,
        )
        report = evaluation.run(t.method)
    rows = [row for row in report.rows if row["slice"] == "class"]
    found = {row["value"]: row["queries"] for row in rows if "task" not in row}
    assert found == {"head": 1, "tail": 3, "never trained": 2}


def test_queries_without_class_or_answer_are_counted_not_averaged(catalogue: Path, tmp_path: Path) -> None:
    lost = {"q0-4": None, "q1-4": "no such class"}  # both val

    def change(row: dict[str, Any]) -> dict[str, Any]:
        key = lost.get(row["item"], row["class_key"])
        return {**row, "class_key": None if row["item"] == "d5" else key}

    whole, _ = evaluated(catalogue, SHARDED)
    report, _ = evaluated(rewritten(catalogue, tmp_path / "changed", change), SHARDED)
    # The document of c5 has no class any more: its query has no answer, and nothing answers the one without class.
    assert (report.figures["queries"], report.figures["queries_without_relevant"]) == (3, 3)
    assert report.figures["documents"] == 6
    assert equal(find(report, "colour", "blue"), find(whole, "colour", "blue")), "c2 is untouched"
    red = find(report, "colour", "red")
    assert (red["queries"], red["queries_without_relevant"]) == (1, 1), "of c0 and c4"
    green = find(report, "colour", "green")
    assert (green["queries"], green["queries_without_relevant"]) == (0, 2) and math.isnan(green["map"])
    never = find(report, "class", "never trained")
    assert (never["queries"], never["queries_without_relevant"]) == (0, 2)


def test_the_panel_marks_nothing_relevant_to_a_query_without_class(catalogue: Path, tmp_path: Path) -> None:
    def change(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "class_key": row["class_key"] if row["split"] == "train" or row["item"] == "d0" else None}

    folder = rewritten(catalogue, tmp_path / "changed", change)
    with trainer(tiny_config(folder, UNUSED, **SHARDED), ready=False) as t:
        rows = panel_rows(t.validation.evaluation.run(t.method), t.loader.catalogue)
    assert len(rows) == 4 and all(len(documents) == 5 for _, documents in rows)
    assert not any(relevant for _, documents in rows for _, _, relevant in documents)


def refusal(catalogue: Path, **settings: Any) -> str:
    with (
        pytest.raises(UserError) as error,
        trainer(tiny_config(catalogue, UNUSED, **{f"evaluation.{k}": v for k, v in settings.items()})),
    ):
        pass
    return str(error.value)


def test_a_slice_that_is_not_an_attribute_is_a_warning(catalogue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"evaluation.slices": ["shape", "color"]}
    with trainer(tiny_config(catalogue, UNUSED, **settings), ready=False) as t:
        rows = t.validation.evaluation.run(t.method).rows
    assert {row["slice"] for row in rows} == {"shape", "class"}
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(told) == 1 and "by color (evaluation.slices)" in told[0] and "It has colour, shape" in told[0]


def test_an_empty_split_is_refused_with_those_there_are(catalogue: Path, tmp_path: Path) -> None:
    message = refusal(catalogue, split="valid")
    assert "split 'valid'" in message and "has no query" in message and "all, test, train, val" in message
    no_documents = rewritten(
        catalogue, tmp_path / "c", lambda r: {**r, "split": "test" if r["kind"] == "document" else r["split"]}
    )
    assert "has no document" in refusal(no_documents, split="val")


def test_a_distractor_that_is_no_catalogue_is_refused(catalogue: Path, tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(catalogue, distractors=[str(tmp_path)])


@pytest.mark.parametrize("panel", [0, 1, 99])
def test_any_number_of_panel_rows(catalogue: Path, panel: int) -> None:
    report, _ = evaluated(catalogue, {"evaluation.panel": panel})
    shown: Sequence[int | str] = [query for query, *_ in report.panel]
    assert len(shown) == len(set(shown)) == min(panel, 6)
    assert all(len(best) == 5 for _, best, _ in report.panel)
