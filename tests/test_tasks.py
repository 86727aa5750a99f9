"""Evaluation by tasks: text queries, same product and category, each against an oracle of a few plain lines; layouts,
views and refusals.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.commands import govern, ingest, tokenizer
from harness.commands.queries import QueriesConfig
from harness.commands.queries import run as make_queries
from harness.core.errors import UserError
from harness.evaluate.attribute_queries import AttributeQueries, without_words
from harness.evaluate.baselines import HISTOGRAM, TITLES, UNTRAINED
from harness.evaluate.coded import Coded
from harness.evaluate.embed import Side
from harness.evaluate.evaluation import EvaluationConfig, Report
from harness.evaluate.tasks.category import predicted
from harness.text.catalogue_facts import prepared
from harness.train import run_baselines
from harness.train.config import RunConfig, parse
from tests.catalogues import draw_rows, make_catalogue, write_manifest
from tests.pool import ranks
from tests.runs import UNUSED, tiny_config, trainer
from tests.test_baselines import overlaps
from tests.test_two_methods import MAKE

TASKS: dict[str, Any] = {
    "evaluation.split": "test",
    "evaluation.batch_size": 5,
    "evaluation.tasks": ["text"],
    "evaluation.final_tasks": ["same_product", "category"],
    "evaluation.views": ["both", "title", "image"],
    "evaluation.bare_titles": ["colour"],
    "evaluation.slices": ["colour"],
    "evaluation.panel": 4,
}


def side(columns: dict[str, list[Any]], ids: list[int] | None = None) -> Side:
    numbers = np.array(ids or range(len(next(iter(columns.values())))))
    coded = {name: Coded.of_list(texts) for name, texts in columns.items()}
    return Side(None, "document", numbers, numbers, numbers, coded)  # type: ignore[arg-type]


@pytest.mark.parametrize("attributes,values", [(1, 12), (2, 3), (3, 2), (3, 6)])
def test_attribute_queries_equal_brute_force(attributes: int, values: int) -> None:
    """Also one attribute, documents without a value, and documents of other catalogues."""
    rng = np.random.default_rng(values)
    names = [f"a{n}" for n in range(attributes)]
    drawn = rng.integers(0, values, (60, attributes))
    lost = rng.random(drawn.shape) < 0.15
    rows = [tuple("" if no else f"V{v}" for v, no in zip(*row, strict=True)) for row in zip(drawn, lost, strict=True)]
    ids = sorted(rng.permutation(200)[:60].tolist())
    known = dict(zip(ids, rows, strict=True))
    columns = {name: [row[n] or rng.choice(["", None]) for row in rows] for n, name in enumerate(names)}
    queries = AttributeQueries(side(columns, ids), names)
    wanted = sorted({row for row in rows if "" not in row})
    assert queries.texts == [" ".join(row).lower() for row in wanted] and 1 < len(wanted) < 60

    gallery = np.array([*ids, *range(200, 260)])
    labels = queries.labels_of(gallery)
    assert labels.tolist() == [wanted.index(known[i]) if known.get(i) in wanted else -1 for i in gallery.tolist()]

    def dcg(gains: list[float]) -> float:
        return sum(gain / math.log2(place + 2) for place, gain in enumerate(gains[:10]))

    seen = set()
    for number, row in enumerate(wanted):
        gains = {}
        for i in gallery.tolist():
            agree = sum(a == b for a, b in zip(row, known.get(i, ()), strict=False))
            gains[i] = 3.0 if agree == attributes else 1.0 if agree == attributes - 1 > 0 else 0.0
            assert queries.grades(np.array([number]), np.array([[i]])) == attributes - agree
        ranking = rng.permutation(gallery).tolist()
        for best in (ranking, sorted(ranking, key=lambda i: -gains[i])):
            ndcg = dcg([gains[i] for i in best]) / dcg(sorted(gains.values(), reverse=True))
            assert queries.graded_ndcg(np.array([number]), np.array([best])) == pytest.approx(ndcg, rel=1e-12)
            seen.add(ndcg)
    assert 1.0 in seen and len(seen) > 2


def test_bare_titles_lack_the_words_of_the_values() -> None:
    titles = ["Men's T-Shirts, navy blue", "Mens blues", None, "Women blue-ish", "The navy"]
    columns = {"title": titles, "gender": ["Men", "", None, "Men", "Men"], "colour": ["Navy Blue", "", "", "", ""]}
    bare = without_words(side(columns), ["gender", "colour"]).retitle
    assert bare is not None and [bare(title) for title in titles] == ["T-Shirts,", "", "", "Women", "The"]
    bare = without_words(side(columns), ["gender"]).retitle
    assert bare is not None and bare(titles[4]) == "The navy"


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 documents of 12 classes, which have one document in split train and two in test each. Read only!

    Both of test are titled alike. d7's has no shape; the shape of class 11 is a word that training does not know.
    """
    folder = tmp_path_factory.mktemp("products")
    rows = draw_rows(folder, classes=12, queries=2, size=24, seed=0)
    for number, row in enumerate(rows):
        row |= {"kind": "document", "split": "test" if number % 3 else "train"}
        row |= {"title": f"{row['colour']} {row['shape']} no {number // 3}", "description": ""}
    rows[22]["shape"] = ""
    rows[34]["shape"] = rows[35]["shape"] = "star"
    manifest, catalogue = write_manifest(folder / "manifest.tsv", rows), folder / "catalogue"
    options = {"class_column": "class_id", "attribute_columns": "colour,shape", "workers": 1}
    ingest.run(ingest.IngestConfig(manifest=manifest, images=folder, out=catalogue, **options))
    govern.run(govern.GovernConfig(catalogue=catalogue, min_queries=0))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=catalogue, vocab_size=32))
    make_queries(QueriesConfig(catalogue=catalogue, min_count=2, category="shape"))
    return catalogue


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_catalogue(tmp_path_factory.mktemp("noise"), classes=7, queries=1, seed=5)


def config_of(catalogue: Path, run: Path, **overrides: Any) -> RunConfig:
    values = {**MAKE, **TASKS, "data.catalogue": catalogue, "run_dir": run, **overrides}
    words = [f"--{key}={v if isinstance(v, str | Path) else json.dumps(v)}" for key, v in values.items()]
    config, _ = parse(words)
    return replace(config, model=prepared("make", config.model, catalogue))


def evaluated(catalogue: Path, settings: dict[str, Any]) -> tuple[Report, dict[str, Any]]:
    """In a pool: the report on the weights that the seed gives, and vectors by sides and views."""
    with trainer(config_of(catalogue, UNUSED, **settings), ready=False) as t:
        evaluation, method = t.validation.evaluation, t.method
        report = evaluation.run(method)
        assert method.towers.training
        method.towers.eval()
        (task,) = evaluation.tasks
        vectors = {
            f"{name} {seen}": evaluation.embedder.embed(method, documents, seen)
            for name, documents in (("own", task.documents), ("bare", task.bare), ("noise", evaluation.documents[1]))
            for seen in ("both", "title", "image")
        }
        vectors["texts"] = evaluation.embedder.embed_texts(method, task.queries.texts)
        weights, _ = evaluation.embedder.apply(
            method, task.documents, lambda batch: method.explain_document(batch).weights, 3
        )
    columns = {name: column.tolist() for name, column in task.documents.columns.items()}
    return report, {**vectors, "weights": weights, "columns": columns}


@pytest.fixture(scope="module")
def found(products: Path, noise: Path) -> tuple[Report, dict[str, Any]]:
    ((report, known),) = ranks(1).run(evaluated, products, {"evaluation.distractors": [str(noise)]})
    return report, known


@pytest.mark.full
def test_every_number_of_ranks_finds_the_same(products: Path, noise: Path, found: tuple[Report, Any]) -> None:
    for report, _ in ranks(3).run(evaluated, products, {"evaluation.distractors": [str(noise)]}):
        assert report.figures == found[0].figures and report.rows == found[0].rows and report.panel == found[0].panel


def by_hand(queries: np.ndarray, documents: np.ndarray, relevant: np.ndarray, ids: np.ndarray, own: np.ndarray) -> Any:
    """(Recall@1, MRR, rankings) from the full matrix; documents with a query's id in `own` are left out."""
    steps = [np.rint(x.astype(np.float64) * 2**26) for x in (queries, documents)]
    scores = np.rint(steps[0] @ steps[1].T / 2**28)
    rankings = [np.lexsort((ids, -row)) for row in scores]
    rankings = [ranking[ids[ranking] != query] for ranking, query in zip(rankings, own, strict=True)]
    first = [np.flatnonzero(relevant[q][ranking])[:1] for q, ranking in enumerate(rankings)]
    places = np.array([int(place[0]) for place in first if len(place)])
    return (places == 0).mean(), (1 / (places + 1)).mean(), rankings


def test_tasks_equal_a_full_matrix(found: tuple[Report, Any]) -> None:
    report, known = found
    texts, shapes, colours = known["texts"], known["columns"]["shape"], known["columns"]["colour"]
    own_ids = known["own both"].ids.numpy()
    queries = AttributeQueries(side(known["columns"], own_ids.tolist()), ["colour", "shape"])
    ids = np.concatenate([own_ids, known["noise both"].ids.numpy()])
    wordings = [f"{colour} {shape}" if shape else None for colour, shape in zip(colours, shapes, strict=True)]
    relevant = np.array([[w == text for w in wordings] + [False] * 7 for text in queries.texts])
    assert texts.ids.tolist() == list(range(len(queries.texts))) and len(ids) == len(set(ids.tolist())) == 24 + 7
    for prefix, kind, seen in (
        ("", "own", "both"),
        ("text/title/", "own", "title"),
        ("text/image/", "own", "image"),
        ("bare_", "bare", "both"),
    ):
        documents = torch.cat([known[f"{kind} {seen}"].vectors, known[f"noise {seen}"].vectors]).numpy()
        recall, mrr, rankings = by_hand(texts.vectors.numpy(), documents, relevant, ids, -1 - texts.ids.numpy())
        assert report.figures[f"{prefix}recall_at_1"] == pytest.approx(recall, rel=1e-12), prefix
        assert report.figures[f"{prefix}mrr"] == pytest.approx(mrr, rel=1e-12), prefix
        graded = np.mean([queries.graded_ndcg(np.array([q]), ids[ranking][None]) for q, ranking in enumerate(rankings)])
        assert report.figures[f"{prefix}graded_ndcg_at_10"] == pytest.approx(graded, rel=1e-12), prefix
        assert report.figures[f"{prefix}documents"] == 31
        if not prefix:
            assert len(report.panel) == 4
            for text, best, marks in report.panel:
                q = queries.texts.index(str(text))
                assert best == ids[rankings[q][:5]].tolist() and marks == relevant[q][rankings[q][:5]].tolist()
    # The image of a product alone finds the other document of its class; among documents seen whole, by title, by
    # image.
    classes = known["own both"].labels.numpy()
    relevant = classes[:, None] == np.concatenate([classes, np.full(7, -1)])[None]
    for seen in ("both", "title", "image"):
        prefix = "same_product/" if seen == "both" else f"same_product/{seen}/"
        documents = torch.cat([known[f"own {seen}"].vectors, known[f"noise {seen}"].vectors]).numpy()
        recall, mrr, _ = by_hand(known["own image"].vectors.numpy(), documents, relevant, ids, own_ids)
        assert report.figures[f"{prefix}queries"] == 24 and mrr < 1
        assert report.figures[f"{prefix}recall_at_1"] == pytest.approx(recall, rel=1e-12)
        assert report.figures[f"{prefix}mrr"] == pytest.approx(mrr, rel=1e-12)
    rows = [row for row in report.rows if row.get("task") == "same_product"]
    assert {(row["slice"], row["value"], row["queries"]) for row in rows} == {
        ("colour", colour, 6) for colour in ("red", "green", "blue", "yellow")
    }


def compared(catalogue: Path, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """In a pool: baselines of the weights that the seed gives, and their signs."""
    with trainer(config_of(catalogue, UNUSED, **settings), ready=False) as t:
        evaluation = t.validation.evaluation
        baselines = run_baselines.computed(t.config, evaluation, t.method, t.mesh)
        return asdict(baselines), evaluation.run(t.method).signs


@pytest.mark.parametrize("task,plain,counts", [("text", TITLES, (5, 10)), ("same_product", HISTOGRAM, (5, 10))])
def test_searches_without_photos_of_queries_have_baselines(
    products: Path, task: str, plain: str, counts: tuple[int, int]
) -> None:
    """Texts beside the words of titles, a product's own photo beside its colours; over the ranks as on one."""
    settings = {"evaluation.tasks": [task], "evaluation.final_tasks": [], "evaluation.baselines": 5}
    ((wanted, signs),) = ranks(1).run(compared, products, settings)
    assert (wanted["queries"], wanted["documents"]) == counts and list(wanted["recall"]) == [plain, UNTRAINED]
    assert signs["sample_recall_at_1"] == wanted["recall"][UNTRAINED] and signs["asked"] == 5
    for found, seen in ranks(3).run(compared, products, settings):
        assert found == wanted and seen == signs
    with trainer(config_of(products, UNUSED, **settings), ready=False) as t:
        sample = t.validation.evaluation.sample
    labels = sample.documents.labels
    if task == "text":  # of equal titles the lowest id is the first, and the words of each title are its product's
        said = [row["title"].lower() for row in sample.documents.catalogue.rows(sample.documents.sample_ids, ["title"])]
        words = [set(title.split()) for title in said]
        first = [max(range(10), key=lambda n: (len(words[n] & {*text.split()}), -n)) for text in sample.texts]
    else:
        pictures = overlaps(sample.documents)
        own = sample.documents.rows_of(sample.queries.ids)
        shared = np.minimum(pictures[own][:, None], pictures[None]).sum(2)
        shared[np.arange(5), own] = -1
        first = shared.argmax(1).tolist()
    assert wanted["recall"][plain] == np.mean(labels[first] == sample.queries.labels) > 0


def test_views_leave_out_what_they_do_not_see(found: tuple[Report, Any]) -> None:
    known = {name: part.vectors for name, part in found[1].items() if name.split()[0] in ("own", "bare")}
    title, image = known["own title"], known["own image"]
    assert torch.equal(title[0], title[1]) and not torch.equal(image[0], image[1]), "one title, two pictures"
    assert torch.equal(known["bare image"], image) and not torch.equal(known["bare title"], title)
    for one, other in (("both", "title"), ("both", "image"), ("title", "image")):
        assert (known[f"own {one}"] - known[f"own {other}"]).abs().amax(1).min() > 1e-3


def test_modal_weights_are_means_by_category(found: tuple[Report, Any]) -> None:
    report, known = found
    weights, shapes = known["weights"].numpy(), np.array(known["columns"]["shape"])
    rows = {row["value"]: row for row in report.rows if "weights" in row}
    assert list(rows) == ["box", "cross", "disc", "star", "all"]
    assert [row["documents"] for row in rows.values()] == [7, 6, 8, 2, 24]
    for value, row in rows.items():
        mine = weights if value == "all" else weights[shapes == value]
        assert list(row["weights"].values()) == pytest.approx(mine.mean(0).tolist(), rel=1e-5)
        assert sum(row["weights"].values()) == pytest.approx(1, abs=1e-5)
    names = ("weight_title", "weight_image", "weight_fused")
    assert [report.figures[name] for name in names] == list(rows["all"]["weights"].values())


def test_category_is_predicted_from_vectors() -> None:
    rng = np.random.default_rng(0)
    centres = np.eye(4, 12)
    y, truth = np.repeat(["a", "b", "c", "d"], 40), np.repeat(["a", "b", "c", "d"], 25)

    def near(labels: np.ndarray) -> np.ndarray:
        x = centres[np.searchsorted(["a", "b", "c", "d"], labels)] + 0.05 * rng.standard_normal((len(labels), 12))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    x, asked = near(y), near(truth)
    names = [f"{kind}{metric}" for kind in ("", "knn_") for metric in ("accuracy", "macro_f1")]
    right = predicted(x, y, asked, truth)
    assert [right[name] for name in names] == [1.0] * 4 and (right["queries"], right["documents"]) == (100, 160)
    chance = predicted(x, rng.permutation(y), asked, truth)
    assert all(0.1 < chance[name] < 0.4 for name in ("accuracy", "knn_accuracy"))
    # What training did not show counts as wrong: three of four categories are right, each with no or half of its asked
    # ones.
    unseen = predicted(x[y != "d"], y[y != "d"], asked, truth)
    assert unseen["accuracy"] == unseen["knn_accuracy"] == 0.75
    assert 0.6 <= unseen["macro_f1"] < 0.75, "of four categories, not of three"
    few = predicted(x[::40], y[::40], asked, truth)
    assert few["knn_accuracy"] == 1.0, "fewer documents than neighbours; the nearer weigh more"


def test_category_over_a_catalogue(found: tuple[Report, Any]) -> None:
    figures = {name.split("/")[-1]: v for name, v in found[0].figures.items() if name.startswith("category/title/")}
    assert (figures["queries"], figures["documents"]) == (23, 12)
    assert 0.5 < figures["accuracy"] <= 21 / 23, "titles name the shape, but nobody knows a star"


def test_documents_that_are_asked_do_not_teach(catalogue: Path) -> None:
    """All documents of this catalogue are of every split."""
    settings = {"evaluation.tasks": ["category"], "evaluation.category": "shape"}
    with (
        pytest.raises(UserError, match="fewer than two values to learn"),
        trainer(tiny_config(catalogue, UNUSED, **settings), ready=False),
    ):
        pass


@pytest.mark.parametrize(
    "method,settings,message",
    [
        ("make", {"tasks": ("photo",)}, "evaluation.tasks has 'photo'; make knows text, same_product, category"),
        ("oclear", {"final_tasks": ("text",)}, "evaluation.final_tasks has 'text'; oclear knows photo, category"),
        ("oclear", {"views": ("title",)}, "evaluation.views has 'title'; oclear knows both, image"),
        ("item", {"views": ()}, "evaluation.views is empty"),
        ("make", {}, "evaluation.query_attributes is empty"),
        ("item", {"final_tasks": ("category",)}, "evaluation.category is empty"),
    ],
)
def test_configuration_errors_name_the_key(method: str, settings: dict[str, Any], message: str) -> None:
    assert any(message in error for error in EvaluationConfig(**settings).errors(method))
    good = {"query_attributes": ("colour",), "category": "shape", "views": ("both",)}
    assert EvaluationConfig(**good).errors(method) == []


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"query_attributes": ["colour", "size"]}, "evaluation.query_attributes names 'size'"),
        ({"bare_titles": ["brand"]}, "evaluation.bare_titles names 'brand'"),
        ({"category": "kind of thing"}, "evaluation.category names 'kind of thing'"),
        ({"split": "train"}, "no two documents of"),
        ({"learn_split": "nowhere"}, "split 'nowhere' of"),
    ],
)
def test_what_the_catalogue_lacks_is_refused(products: Path, settings: dict[str, Any], message: str) -> None:
    config = config_of(products, UNUSED, **{f"evaluation.{key}": value for key, value in settings.items()})
    with pytest.raises(UserError, match=message), trainer(config, ready=False):
        pass


def test_documents_without_all_attributes_make_no_query() -> None:
    class Named:
        path, attributes = Path("shop"), ["colour", "shape"]

    documents = replace(side({"colour": ["red", ""], "shape": [None, "disc"]}), catalogue=Named())
    with pytest.raises(UserError, match="no document of shop has a value in each"):
        AttributeQueries(documents, ["colour", "shape"])


def test_tasks_are_logged_by_name(products: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first task's metrics stand under retrieval, those of others under their own names; final tasks are asked at
    the end.
    """
    run = tmp_path / "run"
    settings = {"train.steps": 2, "train.evaluate_every": 1, "evaluation.views": ["both", "image"]}
    with trainer(config_of(products, run, **settings)) as t:
        t.fit()
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.startswith("baselines"))
    kept = json.loads((run / "baselines.json").read_text())["baselines"]
    assert line.endswith(", ".join(f"{name} {recall:.3f}" for name, recall in kept["recall"].items()))
    assert f"test recall@1 of {kept['queries']} texts against 24 documents: {TITLES}" in line
    (own,) = (line for line in shown.splitlines() if line.startswith("step 2: test recall@1"))
    assert own.endswith(f"; {line.split(': ')[1]}")
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    steps = {tag: [event.step for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    for tag in (
        "health/2_recall_at_1_test",
        "retrieval/map_test",
        "retrieval/bare_map_test",
        "retrieval/weight_title_test",
        "retrieval/recall_at_1_BM25_of_titles_test",
        "retrieval/recall_at_1_untrained_test",
        "text/image/map_test",
    ):
        assert steps[tag] == [1, 2], tag
    for tag in ("same_product/recall_at_1_test", "same_product/image/map_test", "category/macro_f1_test"):
        assert steps[tag] == [2], tag
    assert not {"text/map", "text/map_test"} & steps.keys()
    saved = json.loads((run / "eval-00000002.json").read_text())
    last = board.Scalars("same_product/image/map_test")[-1].value
    assert saved["same_product/image/map"] == pytest.approx(last, rel=1e-6)
    assert {row.get("task") for row in saved["slices"]} == {None, "same_product", "same_product/image"}
