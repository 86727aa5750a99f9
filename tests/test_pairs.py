"""Several right answers: the table of pairs, and what evaluation, classes and training make of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.pairs import Pairs
from harness.commands import govern, ingest, merge, pairs, tokenizer
from harness.core.errors import UserError
from harness.data.loader import StepLoader
from harness.evaluate.evaluation import Report
from models.batch import Reads
from tests.catalogues import COLUMNS, draw_rows, make_catalogue, write_manifest
from tests.pool import ranks
from tests.runs import UNUSED, tiny_config, trainer

FIELDS = ("query_id", "document_id", "grade")
# Of a catalogue with 4 classes of a document (d0, sample 0; d1, 3; …) and two photos (q0-1, 1; q0-2, 2; q1-1, 4; …).
GOOD = [("q1-1", "d3", "0.5"), ("q0-1", "d1", "2"), ("q0-1", "d0", "1"), ("q0-2", "d3", "0"), ("q1-1", "d0", "3")]
EXPECTED = [(1, 0, 1.0), (1, 3, 2.0), (2, 9, 0.0), (4, 0, 3.0), (4, 9, 0.5)]
FIRST = ("q0-1", "d1", "?")  # so that the next row of this pair is not its second
BAD = {
    ("q0-1", "d0", "3"): "named before",
    ("q9", "d0", "1"): "no query of that id",
    ("d0", "d1", "1"): "no query of that id",
    ("q0-1", "q0-2", "1"): "no document of that id",
    ("q0-2", "d2", "-1"): "grade is not a number from 0 to 1e+06: '-1'",
    ("q0-2", "d1", "nan"): "grade is not a number from 0 to 1e+06: 'nan'",
    ("q0-2", "d0", "1e39"): "grade is not a number from 0 to 1e+06: '1e39'",
    ("q1-2", "d0", "much"): "grade is not a number from 0 to 1e+06: 'much'",
    ("", "d0", "1"): "no query of that id",
}


def table(file: Path, rows: Sequence[tuple[str, ...]], names: tuple[str, ...] = FIELDS) -> Path:
    return write_manifest(file, [dict(zip(names, row, strict=True)) for row in rows], names)


def stored(catalogue: Path) -> list[tuple[int, int, float]]:
    found = Pairs.open(catalogue)
    assert found is not None
    return [*zip(found.query.tolist(), found.document.tolist(), found.grade.tolist(), strict=True)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_catalogue(tmp_path_factory.mktemp("small"), classes=4, queries=2, size=16)


def test_bad_rows_cost_only_themselves(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = table(tmp_path / "t.tsv", [FIRST, *GOOD, *BAD])
    with file.open("ab") as more:
        more.write(b"q0-2\td\xff\t1\nq0-2\n")
    figures = pairs.run(pairs.PairsConfig(catalogue=small, table=file))
    assert stored(small) == EXPECTED
    reasons = [*BAD.values(), "not UTF-8, or too long", "wrong number of cells: 1, the header has 3"]
    rows = pq.read_table(small / "pairs/quarantine.parquet").to_pylist()
    first, *others = [(row["row"], row["reason"]) for row in rows]
    assert first == (0, "grade is not a number from 0 to 1e+06: '?'") and others == [*enumerate(reasons, 1 + len(GOOD))]
    assert [(row["query_id"], row["document_id"]) for row in rows[1 : 1 + len(BAD)]] == [key[:2] for key in BAD]
    assert figures | {"reasons": None} == {
        "pairs": 5,
        "queries": 3,
        "documents": 3,
        "graded": True,
        "quarantined": 12,
        "reasons": None,
    }
    assert figures["reasons"]["no query of that id"] == 3
    printed = capsys.readouterr().out
    assert f"{small}/pairs: 5 pairs of 3 queries and 3 documents\n12 rows in pairs/quarantine.parquet: 5 x " in printed
    assert json.loads((small / "pairs/pairs.json").read_text())["format"] == 1


def test_every_kind_of_table_gives_the_same(small: Path, tmp_path: Path) -> None:
    typed = pa.table({"a": [q for q, _, _ in GOOD], "b": [d for _, d, _ in GOOD], "c": [float(g) for *_, g in GOOD]})
    pq.write_table(typed, tmp_path / "typed.parquet")
    names = ("a", "b", "c")
    columns: dict[str, Any] = {"query_column": "a", "document_column": "b", "grade_column": "c"}
    for file in (tmp_path / "typed.parquet", table(tmp_path / "t.csv", GOOD, names)):
        pairs.run(pairs.PairsConfig(catalogue=small, table=file, **columns))
        assert stored(small) == EXPECTED
    ungraded = table(tmp_path / "u.tsv", [row[:2] for row in GOOD[:3]], FIELDS[:2])
    assert not pairs.run(pairs.PairsConfig(catalogue=small, table=ungraded))["graded"]
    assert stored(small) == [(1, 0, 1.0), (1, 3, 1.0), (4, 9, 1.0)]
    with pytest.raises(UserError, match=r"no column 'c' \(--grade-column\)"):
        pairs.run(pairs.PairsConfig(catalogue=small, table=ungraded, grade_column="c"))
    with pytest.raises(UserError, match=r"none of its 1 rows can be used \(1 x no document of that id\)"):
        pairs.run(pairs.PairsConfig(catalogue=small, table=table(tmp_path / "n.tsv", [("q0-1", "x", "1")])))
    assert len(stored(small)) == 3, "the previous pairs are kept"


def test_an_id_of_several_samples_means_all_of_them_also_after_append_and_merge(tmp_path: Path) -> None:
    rows = draw_rows(tmp_path, classes=3, queries=2, size=16, seed=0)
    for row in rows:
        row["id"] = row["class_id"]  # as all images of a product may have
    file = table(tmp_path / "t.tsv", [("c0", "c0"), ("c0", "c2"), ("c2", "c1")], FIELDS[:2])
    whole = [(1, 0, 1.0), (1, 6, 1.0), (2, 0, 1.0), (2, 6, 1.0), (7, 3, 1.0), (8, 3, 1.0)]
    manifests = [
        write_manifest(tmp_path / f"{n}.tsv", part, COLUMNS) for n, part in enumerate((rows, rows[:5], rows[5:]))
    ]
    options: dict[str, Any] = {"images": tmp_path, "workers": 1}
    grown = tmp_path / "grown"
    ingest.run(ingest.IngestConfig(manifest=manifests[1], out=grown, **options))
    pairs.run(pairs.PairsConfig(catalogue=grown, table=file))
    assert stored(grown) == (before := [(1, 0, 1.0), (2, 0, 1.0)])
    ingest.run(ingest.IngestConfig(manifest=manifests[2], out=grown, append=True, **options))
    assert stored(grown) == before, "samples keep their ids"
    pairs.run(pairs.PairsConfig(catalogue=grown, table=file))
    assert stored(grown) == whole
    for part in ("1/2", "2/2"):
        ingest.run(ingest.IngestConfig(manifest=manifests[0], out=tmp_path / "merged", part=part, **options))
    merge.run(merge.MergeConfig(catalogue=tmp_path / "merged"))
    pairs.run(pairs.PairsConfig(catalogue=tmp_path / "merged", table=file))
    assert stored(tmp_path / "merged") == whole


# --- rooms: photos that show several products ---

NAMED = {
    "q0-1": {"d0": 2, "d1": 1, "d4": 1},  # train, without a class
    "q1-1": {"d2": 1, "d3": 0},  # train, of c1
    "q2-4": {"d2": 3, "d5": 1, "d0": 1, "d1": 0},  # val, without a class
    "q3-4": {"d5": 2},  # val, of c3: the table wins
}


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared catalogue's 6 classes of 1 document and 5 photos; two photos have no class, four have pairs."""
    folder = tmp_path_factory.mktemp("rooms")
    rows = draw_rows(folder, classes=6, queries=5, size=48, seed=0)
    for row in rows:
        if row["id"] in ("q0-1", "q2-4"):
            row["class_id"] = ""
    manifest, catalogue = write_manifest(folder / "manifest.tsv", rows), folder / "catalogue"
    options: dict[str, Any] = {"attribute_columns": "colour,shape", "workers": 1}
    ingest.run(ingest.IngestConfig(manifest=manifest, images=folder, out=catalogue, **options))
    named = [(q, d, str(grade)) for q, found in NAMED.items() for d, grade in found.items()]
    pairs.run(pairs.PairsConfig(catalogue=catalogue, table=table(folder / "t.tsv", named)))
    govern.run(govern.GovernConfig(catalogue=catalogue))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=catalogue, vocab_size=48))
    return catalogue


def test_a_photo_is_a_member_of_the_class_of_each_right_answer(rooms: Path) -> None:
    catalogue = Catalogue(rooms)
    table = {row["item"]: row for row in catalogue.table(["item", "kind", "class_key"], split="train").to_pylist()}
    wanted: dict[str, set[int]] = {f"c{n}": set() for n in range(6)}
    for item, row in table.items():
        if row["kind"] == "query":
            answers = [table[d]["class_key"] for d, grade in NAMED.get(item, {}).items() if grade]
            for key in filter(None, {row["class_key"], *answers}):
                wanted[key].add(row["sample_id"])
    keys = pq.read_table(rooms / "classes/classes.parquet")["class_key"].to_pylist()
    members, offsets = (np.load(rooms / f"classes/query.{name}.npy") for name in ("members", "member_offsets"))
    found = dict(zip(keys, (part.tolist() for part in np.split(members, offsets[1:-1])), strict=True))
    assert found == {key: sorted(samples) for key, samples in wanted.items()}
    assert sum(map(len, found.values())) == 17 + 3 + 1
    assert keys == ["c0", "c1", "c4", "c2", "c3", "c5"], "by the first sample; c1 and c4 share theirs"
    # The photo without a class is no longer one without a use; that of another split is not there.
    assert len(pq.read_table(rooms / "classes/quarantine.parquet")) == 0


def test_a_photo_that_answers_a_held_out_class_is_in_no_other(rooms: Path, tmp_path: Path) -> None:
    catalogue = tmp_path / "rooms"
    shutil.copytree(rooms, catalogue)
    members, shared = np.load(rooms / "classes/query.members.npy"), set[int]()
    for share in (0.2, 0.4, 0.6, 0.8):
        govern.run(govern.GovernConfig(catalogue=catalogue, hold_out_classes=share))
        held = set(pq.read_table(catalogue / "classes/held_out.parquet")["sample_id"].to_pylist())
        trained = set(np.load(catalogue / "classes/query.members.npy").tolist())
        assert not held & trained and trained | held >= set(members.tolist())
        shared |= held & {sample for sample in members.tolist() if (members == sample).sum() > 1}
    assert shared


def evaluated(catalogue: Path, settings: dict[str, Any]) -> tuple[Report, dict[str, Any]]:
    with trainer(tiny_config(catalogue, UNUSED, **settings), ready=False) as t:
        report = t.validation.evaluation.run(t.method)
        sides = {"queries": t.validation.evaluation.tasks[0].queries, "documents": t.validation.evaluation.documents[0]}
        vectors = {name: t.validation.evaluation.embedder.embed(t.method, side) for name, side in sides.items()}
    return report, vectors


SHARDED = {"evaluation.batch_size": 4, "evaluation.slices": ["colour"], "evaluation.panel": 6}


def test_evaluation_takes_the_answers_that_the_table_names(rooms: Path) -> None:
    ((report, vectors),) = ranks(1).run(evaluated, rooms, SHARDED)
    queries, documents = vectors["queries"], vectors["documents"]
    steps = [np.rint(part.vectors.double().numpy() * 2**26) for part in (queries, documents)]
    scores, ids = np.rint(steps[0] @ steps[1].T / 2**28), documents.ids.numpy()
    items = {row["sample_id"]: row["item"] for row in Catalogue(rooms).table(["item"]).to_pylist()}
    found: dict[str, list[float]] = {"ndcg_at_10": [], "found_at_10": [], "map": [], "recall_at_1": []}
    panel = []
    for query, row in zip(queries.ids.tolist(), scores, strict=True):
        ranking = ids[np.lexsort((ids, -row))]
        grades = NAMED.get(items[query], {f"d{query // 6}": 1})
        gains = [float(grades.get(items[document], 0)) for document in ranking.tolist()]
        panel.append((query, ranking[:5].tolist(), [gain > 0 for gain in gains[:5]]))
        places = [place for place, gain in enumerate(gains) if gain]
        ideal = sum(gain / math.log2(place + 2) for place, gain in enumerate(sorted(gains, reverse=True)))
        found["ndcg_at_10"].append(sum(gain / math.log2(place + 2) for place, gain in enumerate(gains)) / ideal)
        found["found_at_10"].append(1.0)
        found["map"].append(float(np.mean([(n + 1) / (place + 1) for n, place in enumerate(places)])))
        found["recall_at_1"].append(float(places[0] == 0))
    assert report.figures["queries"] == 6
    assert {name: report.figures[name] for name in found} == pytest.approx({n: np.mean(v) for n, v in found.items()})
    assert report.panel == sorted(panel)
    kinds = {row["value"]: row["queries"] for row in report.rows if row["slice"] == "class"}
    assert kinds["several"] == 1 and sum(kinds.values()) == 6
    for other, _ in ranks(3).run(evaluated, rooms, SHARDED):
        assert other.figures == report.figures and other.panel == report.panel and other.rows == report.rows


def test_every_part_of_a_step_knows_the_answers_among_the_steps_documents(rooms: Path) -> None:
    judged = {(q, d) for q, d, grade in stored(rooms) if grade > 0}
    config = tiny_config(rooms, UNUSED, **{"data.micro_batches": 2, "data.queries_per_step": 5})
    reads, met = Reads(kind="pairs", text_length=config.model.text.max_length), [0, 0]
    for world in (1, 3):
        for step in range(8):
            batches = []
            for rank in range(world):
                with closing(StepLoader(config.data, config.seed, reads, rank, world, torch.device("cpu"))) as loader:
                    batches += loader.load(step).batches
            documents = {d for batch in batches for d in batch.document_ids.tolist()}
            width = {batch.answers.shape[1] for batch in batches}
            assert len(width) == 1 and sum(len(batch.query_ids) for batch in batches) == 5
            most = 0
            for batch in batches:
                for query, answers in zip(batch.query_ids.tolist(), batch.answers.tolist(), strict=True):
                    own = [answer for answer in answers if answer >= 0]
                    assert sorted(own) == sorted(d for q, d in judged if q == query and d in documents)
                    assert answers == own + [-1] * (len(answers) - len(own))
                    most = max(most, len(own))
                    met[0] += len(own)
                    met[1] += sum(q == query for q, _ in judged) - len(own)
            assert width == {most}
    assert min(met) > 5, "right answers in the step, and others"


def trained(catalogue: Path, folder: Path, micro_batches: int) -> list[tuple[float, float]]:
    settings = {"model.objective": "contrastive", "data.micro_batches": micro_batches, "data.queries_per_step": 12}
    with trainer(tiny_config(catalogue, folder, **settings)) as t:
        steps = [t.train_step(data) for data in t.loader.steps(0, 2)]
    return [(step.loss.item(), float(step.norm)) for step in steps]


def test_training_on_pairs_is_the_same_at_every_layout(rooms: Path, tmp_path: Path) -> None:
    (wanted,) = ranks(1).run(trained, rooms, tmp_path / "1", 1)
    for world, micro_batches in ((1, 3), (3, 2)):
        for found in ranks(world).run(trained, rooms, tmp_path / f"{world}-{micro_batches}", micro_batches):
            torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-5, atol=1e-7)


def test_a_right_answer_in_the_step_is_not_a_negative(rooms: Path, tmp_path: Path) -> None:
    judged = {(q, d) for q, d, grade in stored(rooms) if grade > 0}
    settings = {"model.objective": "contrastive", "data.queries_per_step": 12}
    with trainer(tiny_config(rooms, tmp_path / "run", **settings)) as t:
        batch = t.loader.load(0).batches[0].to(torch.device("cpu"), torch.float32)
        t.method.towers.eval()
        with torch.no_grad():
            loss, _ = next(t.method.losses([batch]))
            cosine = t.method.embed_query(batch) @ t.method.embed_document(batch).T
        logits = cosine.double() / t.config.model.temperature
    queries, documents, labels = (x.tolist() for x in (batch.query_ids, batch.document_ids, batch.query_labels))
    classes = torch.tensor([[a == b for b in labels] for a in labels])
    named = torch.tensor([[(q, d) in judged for d in documents] for q in queries])
    assert (named & ~classes).any()
    total = torch.zeros((), dtype=torch.float64)
    for scores, hidden in ((logits, classes | named), (logits.T, (classes | named).T)):
        positive = scores.diag()[:, None]
        rest = torch.cat([positive, scores.masked_fill(hidden, -torch.inf)], 1)
        total += (rest.logsumexp(1) - positive[:, 0]).mean() / 2
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
