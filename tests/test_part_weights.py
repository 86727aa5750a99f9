"""Weights of a document's parts that are chosen after training: against an evaluation of each, and in the artefact."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.artefact.artefact import Artefact
from harness.catalogue.catalogue import Catalogue
from harness.commands import evaluate, export
from harness.core.errors import UserError
from harness.core.files import read_json
from harness.core.mesh import Mesh, MeshConfig
from harness.evaluate.embed import Embedder, side_of
from harness.evaluate.part_weights import GRID, Choice, choose, weigh_parts
from harness.text.tokenizer import Tokenizer
from harness.train.open_run import find_checkpoint, load_method, open_settings
from tests.catalogues import make_catalogue
from tests.pool import ranks
from tests.runs import UNUSED, tiny_config, trainer

FULL = pytest.mark.full
SUM = {"model.fusion_kind": "sum", "model.fusion_weights": [1.0, 0.7, 0.4], "evaluation.baselines": 100}
TRAIN = {"evaluation.split": "train"}  # has the most photos
KEPT = (1.0, 0.7, 0.4)
SOME = [(1.0, 0.25, 2.0), (0.0, 1.0, 0.5), (1.0, 0.0, 0.0), KEPT]


def chosen(catalogue: Path, settings: dict[str, Any]) -> tuple[Choice, tuple[float, ...], dict[Any, float]]:
    """The choice, the weights that the method has then, and the figure of some weights by a whole evaluation."""
    with trainer(tiny_config(catalogue, UNUSED, **{**SUM, **settings}), ready=False) as t, torch.no_grad():
        evaluation = t.validation.evaluation

        def figure(weights: tuple[float, ...]) -> float:
            t.method.weigh_parts(weights)
            report = evaluation.run(t.method)
            rows = [row for row in report.rows if (row["slice"], row["value"]) == ("class", "never trained")]
            values = [report.figures["recall_at_1"], *(row["recall_at_1"] for row in rows if "task" not in row)]
            return sum(values) / len(values)

        figures = {weights: figure(weights) for weights in SOME}
        t.method.towers.eval()
        t.method.weigh_parts(KEPT)
        choice = weigh_parts(evaluation, t.method)
        weights = t.method.part_weights
        return choice, weights, {**figures, weights: figure(weights)}


@pytest.mark.parametrize("world", [1, pytest.param(3, marks=FULL)])
def test_the_choice_is_measured_as_a_whole_evaluation_measures_it(catalogue: Path, world: int) -> None:
    found = ranks(world).run(chosen, catalogue, TRAIN)
    choice, weights, figures = found[0]
    assert tuple(choice.weights.values()) == weights and [*choice.weights] == ["image", "steered", "text"]
    assert choice.before == pytest.approx(figures[KEPT], abs=1e-9)
    assert choice.after == pytest.approx(figures[weights], abs=1e-9)
    assert choice.best >= max(figures.values()) - 1e-9 and len({*figures.values()}) > 1
    assert weights == KEPT or weights in product((1.0, 0.0), GRID, GRID)
    assert all(other[:2] == found[0][:2] for other in found)


IMAGE, SOME_TEXT, TEXT = (1.0, 0.0, 0.0), (1.0, 0.0, 1.0), (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("hits", "wanted"),
    [
        # Of 100 photos text wins 9 and loses 1: 0.08, and the standard error is sqrt(10) / 100 = 0.032.
        ({IMAGE: [1] * 41 + [0] * 59, SOME_TEXT: [0] + [1] * 49 + [0] * 50}, SOME_TEXT),
        # It wins 5 and loses 3: 0.02, and 0.028.
        ({IMAGE: [1] * 40 + [0] * 60, SOME_TEXT: [0] * 3 + [1] * 42 + [0] * 55}, IMAGE),
        # Text alone is best, image and text within the error, images alone are not: the largest share of the image.
        ({IMAGE: [0] * 100, SOME_TEXT: [1] * 50 + [0] * 50, TEXT: [1] * 51 + [0] * 49}, SOME_TEXT),
        # It wins 3 and loses 1: as much as the error.
        ({IMAGE: [1] * 40 + [0] * 60, SOME_TEXT: [0] + [1] * 42 + [0] * 57}, IMAGE),
        # No difference at all.
        ({SOME_TEXT: [1, 0], IMAGE: [1, 0]}, IMAGE),
    ],
)
def test_more_than_images_has_to_find_more_than_chance(hits: dict[Any, list[int]], wanted: tuple[float, ...]) -> None:
    found = {weights: np.array(each, bool) for weights, each in hits.items()}
    photos = len(hits[wanted])
    assert choose(found, np.full(photos, 1 / photos)) == wanted


def exported(run: Path, out: Path, **more: Any) -> Path:
    export.run(export.ExportConfig(run=run, out=out, batch_size=4, onnx=False, golden=0, **more))
    return out


@pytest.fixture(scope="module")
def run(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighed") / "run"
    with trainer(tiny_config(catalogue, folder, **{**SUM, "train.steps": 1})) as t:
        t.fit()
    return folder


def vectors(run: Path, weights: tuple[float, ...] | None) -> dict[str, np.ndarray]:
    """Embeddings of the documents of a run's catalogue with such weights, by item."""
    settings = open_settings(run, 1)
    catalogue, tokenizer = Catalogue(settings.data.catalogue), Tokenizer.load(run)
    with Mesh(MeshConfig()) as mesh:
        method, model = load_method(settings, find_checkpoint(run, None, mesh), tokenizer, mesh)
        if weights is not None:
            method.weigh_parts(weights)
        side = side_of(catalogue, "document", None, [], None, 0)
        found = Embedder(settings.data, model, tokenizer, 4, mesh).embed(method, side)
    rows = catalogue.rows(side.sample_ids.tolist(), ["item"])
    return {row["item"]: vector for row, vector in zip(rows, found.vectors.numpy(), strict=True)}


def require_vectors(out: Path, known: dict[str, np.ndarray]) -> None:
    artefact = Artefact(out)
    (hits,) = artefact.search(artefact.vector(0), len(known) + 1)
    assert {hit.id for hit in hits} == known.keys() and len(hits) == len(known)
    for item, vector in known.items():
        np.testing.assert_allclose(artefact.vector(artefact.document(item))[0], vector, atol=1e-6)


def test_an_artefact_has_the_weights_that_eval_chooses(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = exported(run, tmp_path / "out", weigh_parts=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights of a document's")]
    weights = read_json(out / "artefact.json")["part_weights"]
    assert line.startswith(f"weights of a document's parts: image {weights['image']:g}, steered {weights['steered']:g}")
    require_vectors(out, vectors(run, tuple(weights.values())))
    evaluate.run(evaluate.EvalConfig(run=run, split="test", weigh_parts=True))
    assert line in capsys.readouterr().out.splitlines()


@FULL
def test_added_documents_get_the_weights_that_the_artefact_has(run: Path, catalogue: Path, tmp_path: Path) -> None:
    few = make_catalogue(tmp_path / "few", classes=4)
    out = exported(run, tmp_path / "out", catalogue=few, weigh_parts=True)
    weights = read_json(out / "artefact.json")["part_weights"]
    exported(run, out, append=True)
    assert read_json(out / "artefact.json")["part_weights"] == weights
    require_vectors(out, vectors(run, tuple(weights.values())))
    with pytest.raises(UserError, match=r"--append keeps the weights that are there. Leave out one of them"):
        exported(run, out, append=True, weigh_parts=True)


def test_what_cannot_be_weighed_is_refused(run: Path, catalogue: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"and --view is image. Leave out one of them"):
        exported(run, tmp_path / "out", view="image", weigh_parts=True)
    concept = tmp_path / "run"
    with trainer(tiny_config(catalogue, concept, **{"train.steps": 1})) as t:
        t.fit()
    with pytest.raises(UserError, match=r"the parts of a sum, model.fusion_kind concept has none"):
        exported(concept, tmp_path / "out", weigh_parts=True)
    assert not (tmp_path / "out").exists()
